"""Reads snapshots in a thread that nobody has to wait for, not even the end of the process."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future

import structlog

from apiary_server.sessions.info import RebuildReason
from apiary_server.sessions.restored import Restored
from apiary_server.sessions.session import Session
from apiary_server.threads import alone

Found = tuple[Restored | None, RebuildReason | None]
"""A cache, or None; and if it lacks turns, or is none, why."""
_LOST: Found = None, RebuildReason.SNAPSHOT_CORRUPT
_PATIENCE = 5.0  # seconds after which a read hangs, and to compute a cache anew is quicker
_log = structlog.get_logger(__name__)


class Fetcher:
    """Reads one after the other, so that it holds up no more than a processor. Thread-safe.

    A read that takes too long, and those behind it, are given up: their caches are lost. Until it has ended
    nothing else is tried.

    Args:
        read: reads a session's cache; may hang.
    """

    def __init__(self, read: Callable[[Session], Found]) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._asked: queue.SimpleQueue[tuple[Session, Future[Found]]] = queue.SimpleQueue()
        self._hangs = False

    def start(self, wake: Callable[[], object]) -> None:
        """Begin.

        Args:
            wake: called after each read.
        """
        self._wake = wake
        ready = threading.Event()
        threading.Thread(target=self._run, args=(ready,), name="fetcher", daemon=True).start()
        ready.wait()

    def fetch(self, session: Session) -> Future[Found]:
        """Read a session's cache; the caller has the session's turn. Returns what came of it; to cancel that
        has it not read, if that has not begun."""
        found: Future[Found] = Future()
        with self._lock:
            if self._hangs:
                found.set_result(_LOST)
            else:
                self._asked.put((session, found))
        return found

    def _run(self, ready: threading.Event) -> None:
        alone()
        ready.set()
        while True:
            session, found = self._asked.get()
            if not found.set_running_or_notify_cancel():
                continue
            outcome = _LOST
            try:
                patience = threading.Timer(_PATIENCE, self._give_up, (session, found))
                patience.daemon = True
                patience.start()
                try:
                    outcome = self._read(session)
                finally:
                    patience.cancel()
            except Exception:
                _log.exception("a cache could not be read, and is computed anew", session=session.id)
            with self._lock:
                self._hangs = False
                if not found.done():
                    found.set_result(outcome)
            self._wake()

    def _give_up(self, session: Session, found: Future[Found]) -> None:
        with self._lock:
            if found.done():
                return
            self._hangs = True
            found.set_result(_LOST)
            while not self._asked.empty():
                _, other = self._asked.get()
                if other.set_running_or_notify_cancel():
                    other.set_result(_LOST)
        _log.error("the store hangs: caches are computed anew", session=session.id)
        self._wake()
