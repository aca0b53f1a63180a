"""Keeps snapshots of caches up to date, in a thread of its own, and reads them.

A snapshot may lag: the transcript that the journal stores is enough to compute what it lacks. So changes of a
session that come quickly make one snapshot, and while turns run, or sessions are forked, the thread takes no
more than a small share of the time from them.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet

import structlog
import torch
from torch import Tensor

from apiary_server.errors import SnapshotRefused
from apiary_server.sessions.compression import Bits, Compression
from apiary_server.sessions.fetcher import Fetcher, Found
from apiary_server.sessions.info import RebuildReason
from apiary_server.sessions.manager import SessionManager
from apiary_server.sessions.restored import Restored, restore
from apiary_server.sessions.session import Session
from apiary_server.sessions.shelf import Shelf
from apiary_server.sessions.snapshot import Image, Origin, decode_own, encode
from apiary_server.sessions.store import StoreError, reason
from apiary_server.threads import alone
from buzz import Rotary

_log = structlog.get_logger(__name__)
_PATIENCE = 5.0  # seconds after which a write hangs
_RETRY = 1.0  # seconds until a store that failed is tried again
_LOOK = 0.05  # seconds between looks whether a session may be copied now
_SHARE = 1 / 100  # of a processor, at most, while others work
_HEAD = 2**17  # bytes that a snapshot may have beside those of the slot


class Archive:
    """Makes snapshots. Thread-safe.

    Args:
        sessions: the table of sessions.
        shelf: where they go.
        origin: whose caches they are.
        rotary: the model's.
        delay: seconds for which a session must have been left alone.
        bits: to which snapshots are compressed; None: they are exact.

    Attributes:
        shelf: as given.
        saved: how many snapshots were made.
    """

    def __init__(
        self,
        sessions: SessionManager,
        shelf: Shelf,
        origin: Origin,
        rotary: Rotary,
        delay: float,
        bits: Bits | None = None,
    ) -> None:
        self.shelf = shelf
        self._sessions = sessions
        self.saved = 0
        self._origin = origin
        self._rotary = rotary
        self._delay = delay
        self._compression = None if bits is None else Compression(bits, rotary)
        self._changed = threading.Condition()
        self._dirty: OrderedDict[int, tuple[Session, float]] = OrderedDict()  # longest unchanged first
        self._urgent: dict[int, Session] = {}
        self._deadline: float | None = None  # of the end
        self._staging = torch.empty(0, dtype=torch.uint8)
        self._rest_until = 0.0
        self._errors: dict[int | None, str] = {}  # what failed last, by dirty session; deletions have none
        self._complained = False  # the log says so
        self._failed = False  # something else did since the last write that did not
        self._writing_since: float | None = None
        self._alone = threading.Event()
        self._thread = threading.Thread(target=self._run, name="archive", daemon=True)
        self._fetcher = Fetcher(self.read)
        sessions.watchers.append(self.note)

    @property
    def error(self) -> str | None:
        """Why some cache that should be stored, or deleted, is not; None where nothing failed."""
        if self._hangs:
            return "the store hangs"
        with self._changed:
            return next(iter(self._errors.values()), None)

    @property
    def degraded(self) -> bool:
        """Whether there is an error."""
        return self.error is not None

    def start(
        self,
        call: Callable[[Callable[[], Image | None]], Future[Image | None]],
        copy: Callable[[Session, Tensor], Image | None],
        busy: Callable[[], bool],
    ) -> None:
        """Begin.

        Args:
            call: has something done by the thread that owns the caches, unless it is cancelled before; it is
                woken so when a cache was read.
            copy: copies a session's committed cache to host memory, there.
            busy: whether turns run, or sessions are changed.
        """
        self._call, self._copy, self._busy = call, copy, busy
        self._thread.start()
        self._alone.wait()
        self._fetcher.start(lambda: call(lambda: None))

    def note(self, session: Session) -> None:
        """A session changed: its turns, or it was deleted."""
        if not session.id:
            return
        self.shelf.forget(session, 0 if session.deleted else len(session.turns))
        with self._changed:
            self._dirty.pop(id(session), None)
            if not session.deleted and session.cached_turns and not self.shelf.current(session):
                self._dirty[id(session)] = (session, time.monotonic())
            else:
                self._mend(id(session))
            self._changed.notify()

    def keeps(self, session: Session) -> bool:
        """Whether there is a snapshot of a session as it is."""
        return self.shelf.current(session)

    def hurry(self, session: Session) -> bool:
        """Have a snapshot made soon; False if that cannot be now."""
        hopeless = self._failed or self._hangs or id(session) in self._errors
        if hopeless or session.layout.bytes + _HEAD > self.shelf.budget:
            return False
        with self._changed:
            self._urgent[id(session)] = session
            self._changed.notify()
        return True

    def turns(self, session: Session) -> int:
        """How many of a session's turns its newest snapshot has; 0 if there is none."""
        return max(self.shelf.turns(session), default=0)

    def release(self, session: Session, *, held: bool = False) -> bool:
        """Have no turn find a session's cache in memory any more; see `SessionManager.let_go`."""
        return self._sessions.let_go(session, held=held)

    def forget(self, session: Session) -> None:
        """No snapshot of a session is of use any more; the caller has its turn."""
        session.epoch += 1
        self.shelf.forget(session)

    def fetch(self, session: Session) -> Future[Found]:
        """Read a session's cache; see `Fetcher.fetch`. Where there is no snapshot, that is known at once."""
        if self.shelf.turns(session):
            return self._fetcher.fetch(session)
        nothing: Future[Found] = Future()
        nothing.set_result((None, session.rebuild or RebuildReason.RESTARTED))
        return nothing

    def read(self, session: Session) -> Found:
        """The last of a session's snapshots that can be used; and if that is not the last of all, or none,
        why. The caller has the session's turn."""
        why, epoch = None, session.epoch
        for turns in self.shelf.turns(session):
            try:
                found = self._read(session, turns, epoch)
            except SnapshotRefused as error:
                _log.warning("a snapshot was refused", session=session.id, turns=turns, reason=error.message)
                if session.epoch == epoch:  # else another may have its name now
                    self.shelf.refuse(session, turns)
                why = why or error.reason
            except StoreError as error:
                _log.error("a snapshot cannot be read", session=session.id, turns=turns, reason=str(error))
                why = why or RebuildReason.SNAPSHOT_CORRUPT
            else:
                return found, None if turns == len(session.turns) else why or session.rebuild
        return None, why or session.rebuild or RebuildReason.RESTARTED

    def close(self, timeout: float) -> None:
        """Make the snapshots that are missing, for `timeout` seconds at most. The caller is now the thread
        that owns the caches, or nobody is."""
        with self._changed:
            self._deadline = time.monotonic() + timeout
            self._changed.notify()
        self._thread.join(timeout + _RETRY)
        if not self._thread.is_alive():
            self.shelf.close()
        if self._dirty:
            _log.warning("some caches have no snapshot: they will be computed anew", count=len(self._dirty))

    @property
    def _hangs(self) -> bool:
        since = self._writing_since
        return since is not None and time.monotonic() - since > _PATIENCE

    def _run(self) -> None:
        alone()
        self._alone.set()
        while True:
            with self._changed:
                if self._deadline is not None:
                    left = [session for session, _ in self._dirty.values()]
                    break
                session = self._next()
                if session is None and not self._may_tidy():
                    self._changed.wait(_LOOK if self._dirty or self.shelf.untidy else None)
                    continue
            self._work(session)
        for session in left:
            if time.monotonic() < self._deadline:
                self._work(session)
        if time.monotonic() < self._deadline:
            self._work(None)

    def _next(self) -> Session | None:
        """Which session's cache is copied now."""
        now = time.monotonic()
        if self._urgent:
            return self._urgent.pop(next(iter(self._urgent)))
        if now < self._rest_until and (self._failed or self._busy()):
            return None
        due = (session for session, since in self._dirty.values() if now - since >= self._delay)
        return next((session for session in due if not session.busy), None)

    def _may_tidy(self) -> bool:
        return self.shelf.untidy and not (self._failed and time.monotonic() < self._rest_until)

    def _work(self, session: Session | None) -> None:
        """Delete what is kept no longer, and make a snapshot of a session."""
        began = time.thread_time()  # of the processor: waiting for a step or a disk takes nothing from turns
        try:
            self._tidy()
            if session is not None:
                self._save(session)
                self._tidy()
        except Exception as error:
            if not isinstance(error, StoreError):
                _log.exception("a fault of ours in a snapshot")
        rest = _RETRY if self._failed else (time.thread_time() - began) / _SHARE
        self._rest_until = max(self._rest_until, time.monotonic() + rest)

    def _tidy(self) -> None:
        with self._told(None), self._writing():
            self.shelf.tidy()
        self._mend(None, worked=None in self._errors)

    def _save(self, session: Session) -> None:
        changed, wrote = self._dirty.get(id(session)), False
        with self._told(session):
            image = self._image(session)
            if image is None:  # it has no cache, or a turn runs, and it is tried again
                done = session.cache is None or self._deadline is not None
            else:
                done = True
                if image.turns:
                    parts = encode(image, self._origin, compression=self._compression)
                    with self._writing():
                        self.saved += self.shelf.put(session, image.epoch, image.turns, parts)
                    self._failed, wrote = False, True
        if done:
            with self._changed:
                if self._dirty.get(id(session)) is changed:
                    self._dirty.pop(id(session), None)
            self._mend(id(session), worked=wrote)

    @contextlib.contextmanager
    def _told(self, session: Session | None) -> Iterator[None]:
        """What fails is an error, of a session or of what is deleted, until it does not."""
        try:
            yield
        except Exception as error:
            key, why = None if session is None else id(session), reason(error)
            with self._changed:
                if session is None or not session.deleted:
                    if not self._complained:
                        _log.error("caches are not stored: serving goes on", reason=why)
                    self._complained = True
                    # one that always fails says nothing of the others
                    self._failed |= key not in self._errors
                    self._errors[key] = why
                if session is not None and not session.deleted:
                    self._dirty[id(session)] = (session, time.monotonic() + _RETRY - self._delay)
                    self._dirty.move_to_end(id(session))  # others may have better luck
            raise

    def _mend(self, key: int | None, *, worked: bool = False) -> None:
        """What failed worked this time, or need not be done any more."""
        with self._changed:
            mended = self._errors.pop(key, None) is not None and not self._errors
            self._failed = self._failed and not mended
            well = worked and self._complained and not self._errors
            self._complained = self._complained and not well
        if well:
            _log.warning("caches are stored again")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        self._writing_since = time.monotonic()
        try:
            yield
        finally:
            self._writing_since = None

    def _image(self, session: Session) -> Image | None:
        """A copy of the session's cache, made by the thread that owns it."""
        if self._staging.numel() < session.layout.bytes:
            self._staging = torch.empty(session.layout.bytes, dtype=torch.uint8)
        made = self._call(lambda: self._copy(session, self._staging))
        while True:
            try:
                return made.result(_LOOK)
            except NotYet:
                if self._deadline is not None and made.cancel():  # that thread has ended
                    return self._copy(session, self._staging)

    def _read(self, session: Session, turns: int, epoch: int) -> Restored:
        if self._hangs:  # to compute it anew is quicker
            raise StoreError("the store hangs")
        data = self.shelf.get(session, turns, session.layout.bytes + _HEAD)
        if data is None:
            evicted = turns not in self.shelf.turns(session)  # just now
            if session.epoch == epoch:
                self.shelf.lose(session, turns)
            why = RebuildReason.SNAPSHOT_EVICTED if evicted else RebuildReason.SNAPSHOT_CORRUPT
            raise SnapshotRefused("it is gone", why)
        manifest, tensors = decode_own(data, self._origin)
        return restore(session, turns, manifest, tensors, self._rotary)
