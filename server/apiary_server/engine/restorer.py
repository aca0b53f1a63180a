"""Brings caches back from the store for what is no turn: changes of sessions, imports, and the start."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import structlog

from apiary_server.engine.mailbox import Mailbox
from apiary_server.errors import BudgetExhausted, Draining
from apiary_server.sessions.archive import Archive
from apiary_server.sessions.info import RebuildReason
from apiary_server.sessions.manager import SessionManager
from apiary_server.sessions.residency import Residency
from apiary_server.sessions.restored import Restored
from apiary_server.sessions.session import Session

_T = TypeVar("_T")
_log = structlog.get_logger(__name__)
_PATIENCE = 5.0  # seconds for which a cache waits for room
_LOOK = 0.005  # seconds between looks whether there is, and whether turns run


class Restorer:
    """Brings one after the other, in a thread of its own, so that only one at a time waits for room. All
    methods may be called from any thread.

    Args:
        archive: what reads snapshots; None: nothing is stored.
        sessions: the table of sessions.
        residency: their memory.
        mailbox: what the engine thread does.
    """

    def __init__(
        self, archive: Archive | None, sessions: SessionManager, residency: Residency, mailbox: Mailbox
    ) -> None:
        self._archive = archive
        self._sessions = sessions
        self._residency = residency
        self._mailbox = mailbox
        self._ended = threading.Event()
        self._thread = ThreadPoolExecutor(1, "restorer")

    def start(self, busy: Callable[[], bool]) -> None:
        """Bring the sessions that were used last, as far as the pool has room, while nobody is `busy`."""
        self._busy = busy
        if self._archive is not None:
            self._thread.submit(self._warm, self._archive, list(reversed(self._sessions.latest())))

    def close(self) -> None:
        """End; nothing more is brought."""
        self._ended.set()
        self._thread.shutdown(wait=False)

    def bring(self, session: Session) -> Future[None]:
        """Have a session's cache in memory, if it is stored; the caller has the session's turn.

        Returns:
            Done when it is there, or has to be computed anew, since there is none or no room; or Draining.
        """
        archive = self._archive
        if archive is None or session.cache is not None or not session.turns:
            done: Future[None] = Future()
            done.set_result(None)
            return done
        return self._submit(lambda: self._bring(archive, session))

    def place(self, session: Session, found: Restored | None, why: RebuildReason | None) -> Future[None]:
        """Have a cache in memory that came from elsewhere; the caller has the session's turn.

        Args:
            session: whose.
            found: the cache; None: it has to be computed anew.
            why: some of it has to.

        Returns:
            Done when it is there; or BudgetExhausted, or Draining.
        """
        return self._submit(lambda: self._place(session, found, why))

    def _submit(self, work: Callable[[], None]) -> Future[None]:
        try:
            return self._thread.submit(work)
        except RuntimeError:  # closed
            done: Future[None] = Future()
            done.set_exception(Draining())
            return done

    def _bring(self, archive: Archive, session: Session) -> None:
        if self._ended.is_set():
            raise Draining()
        with contextlib.suppress(BudgetExhausted):  # then it is computed anew
            self._place(session, *archive.fetch(session).result())

    def _place(self, session: Session, found: Restored | None, why: RebuildReason | None) -> None:
        until = time.monotonic() + _PATIENCE
        while not self._on_engine(lambda: self._take_in(session, found, why)):
            if time.monotonic() >= until:
                raise self._residency.exhausted(session.layout)
            self._ended.wait(_LOOK)

    def _warm(self, archive: Archive, sessions: list[Session]) -> None:
        """Bring the last of these, and the others after what is asked for meanwhile."""
        if not sessions:
            return
        if self._busy():  # steps need the processors
            self._ended.wait(_LOOK)
        elif not self._bring_unheard(archive, sessions.pop()):
            return
        with contextlib.suppress(RuntimeError):  # closed meanwhile
            self._thread.submit(self._warm, archive, sessions)

    def _bring_unheard(self, archive: Archive, session: Session) -> bool:
        """Bring a session that nobody asked for; False if something would have to leave for it."""
        if not self._sessions.begin_unheard(session):
            return True
        try:
            found, why = archive.fetch(session).result()
            return self._on_engine(lambda: self._has_room(session) and self._take_in(session, found, why))
        except Exception:
            if not self._ended.is_set():
                _log.exception("a cache could not be brought")
            return True
        finally:
            self._sessions.end_turn(session)

    def _on_engine(self, work: Callable[[], _T]) -> _T:
        """Have something done on the engine thread, and wait for it."""
        done = self._mailbox.call(work)
        while True:
            with contextlib.suppress(TimeoutError):
                return done.result(1.0)
            if self._ended.is_set():
                raise Draining()

    # the engine thread

    def _take_in(self, session: Session, found: Restored | None, why: RebuildReason | None) -> bool:
        if session.deleted or session.cache is not None:
            return True
        if found is not None and not self._residency.receive(session, found):
            return False
        session.rebuild = why
        return True

    def _has_room(self, session: Session) -> bool:
        return self._residency.has_room(session.layout)
