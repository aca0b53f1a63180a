"""Keeps a store up to date with the table of sessions, in a thread of its own.

What is written is not what was done but how a session is now: its settings, and the turns that the store does
not have yet. So changes that come together are one write, and after a failure the next write has it all.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import structlog

from apiary_server.sessions.manager import SessionManager
from apiary_server.sessions.session import Session
from apiary_server.sessions.store import Store, StoreError, StoreForgot, reason

_log = structlog.get_logger(__name__)
_RETRY = 1.0  # seconds until a store that failed is tried again


class _Waiter:
    """Somebody who waits for a session to be stored."""

    def __init__(self, then: Callable[[bool], None]) -> None:
        self.since = time.monotonic()
        self._then: Callable[[bool], None] | None = then
        self._lock = threading.Lock()

    def tell(self, stored: bool) -> None:
        """Say whether it is; once."""
        with self._lock:
            then, self._then = self._then, None
        if then is not None:
            then(stored)


class Journal:
    """Stores what changes. Thread-safe. The store is tried at once, so that one that fails is known from the
    start.

    Args:
        sessions: the table of sessions, which says what changed.
        store: written to by this alone.
        patience: seconds that anybody waits for a store that hangs.

    Attributes:
        error: why the last write failed, or that it hangs: what changed since would be lost with the process.
            None where all is well.
        unread: how many of the store's sessions could not be read.
    """

    def __init__(self, sessions: SessionManager, store: Store, patience: float) -> None:
        self.error: str | None = None
        self.unread = store.unread
        self._sessions = sessions
        self._store = store
        self._patience = patience
        self._changed = threading.Condition()
        self._dirty: dict[int, Session] = {}
        self._now: dict[int, Session] = {}  # those that are being written
        tried = threading.Event()
        self._waiters = [_Waiter(lambda _: tried.set())]  # of dirty sessions, and for the first write
        self._writing: list[_Waiter] = []  # of those that are being written
        self._closing: float | None = None  # when to give up
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        sessions.watchers.append(self.note)
        self._thread.start()
        if not tried.wait(patience):
            self.give_up(0.0)

    @property
    def degraded(self) -> bool:
        """Whether there is an error."""
        return self.error is not None

    def note(self, session: Session) -> None:
        """A session changed."""
        if session.id:
            with self._changed:
                self._dirty[id(session)] = session
                self._changed.notify()

    def when_stored(self, session: Session, then: Callable[[bool], None]) -> None:
        """Have something done when a session is stored as it is now: with True, or with False if that failed.
        Nobody waits for a store that is known to fail. In this thread, the journal's, or `give_up`'s."""
        waiter, key = _Waiter(then), id(session)
        with self._changed:
            waits = key in self._dirty or key in self._now
            if waits:
                (self._waiters if key in self._dirty else self._writing).append(waiter)
        if not waits or self.degraded:
            waiter.tell(stored=not waits)

    def give_up(self, after: float | None = None) -> None:
        """Tell those who have waited for `after` seconds, or the patience, that nothing was stored."""
        before = time.monotonic() - (self._patience if after is None else after)
        with self._changed:
            overdue = [waiter for waiter in (*self._writing, *self._waiters) if waiter.since < before]
            if not overdue:
                return
            self._writing = [waiter for waiter in self._writing if waiter not in overdue]
            self._waiters = [waiter for waiter in self._waiters if waiter not in overdue]
            self._degrade("the store hangs")
        for waiter in overdue:
            waiter.tell(stored=False)

    def close(self, timeout: float) -> None:
        """Write what is left, and end; after `timeout` seconds whatever is left, which is told."""
        with self._changed:
            self._closing = time.monotonic() + timeout
            self._changed.notify()
        self._thread.join(timeout + _RETRY)
        if self._thread.is_alive():
            self.give_up(0.0)
        else:
            self._store.close()
        if lost := len(self._dirty | self._now):
            _log.critical("what changed last in some sessions was not stored, and is lost", sessions=lost)

    def _run(self) -> None:
        tried = False
        while True:
            with self._changed:
                if self.degraded:
                    self._changed.wait_for(lambda: self._closing is not None, _RETRY)
                while tried and not (self._dirty or self.degraded or self._closing is not None):
                    self._changed.wait()
                if not self._dirty and self._closing is not None:
                    return
                self._now, self._dirty = self._dirty, {}
                self._writing, self._waiters = self._waiters, []
            tried, failed = True, not self._write(list(self._now.values()))
            with self._changed:
                told, self._writing = self._writing, []
                if failed:
                    self._dirty = self._now | self._dirty
                self._now = {}
            for waiter in told:
                waiter.tell(stored=not failed)
            if failed and self._closing is not None and time.monotonic() >= self._closing:
                return

    def _write(self, sessions: list[Session]) -> bool:
        changes = self._sessions.take_changes(sessions)
        try:
            self._store.write(changes)
        except Exception as error:
            self._sessions.put_back(sessions, changes)
            if isinstance(error, StoreForgot):
                self._sessions.store_anew()
            if not isinstance(error, StoreError):
                _log.exception("a fault of ours in a store")
            self._degrade(reason(error))
            return False
        if self.degraded:
            self.error = None
            _log.warning("sessions are stored again")
        return True

    def _degrade(self, why: str) -> None:
        if not self.degraded:
            _log.error("sessions are not stored: serving goes on, what changes is kept in memory", reason=why)
        self.error = why
