"""Which snapshots there are: of which session, after which turn, and how many bytes they have together."""

from __future__ import annotations

import functools
import hashlib
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from apiary_server.sessions.session import Session
from apiary_server.sessions.store import SnapshotStore

_NAME = re.compile(r"([0-9a-f]{32})-([0-9]{1,9})\.snapshot")


class Shelf:
    """A store of snapshots under a budget. Thread-safe; `put` and `tidy` are for one thread.

    Args:
        store: keeps the bytes.
        budget: the most bytes; the least recently used sessions' snapshots go first.
        earlier: how many earlier snapshots of a session are kept beside its last.

    Attributes:
        budget: as given.
    """

    def __init__(self, store: SnapshotStore, budget: int, earlier: int) -> None:
        self.budget = budget
        self._store = store
        self._earlier = earlier
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, dict[int, int]] = OrderedDict()  # bytes by turns; least recent first
        self._refused: set[tuple[str, int]] = set()
        self._used_bytes = 0
        self._doomed: list[str] = []

    @property
    def used_bytes(self) -> int:
        """Of all snapshots together."""
        return self._used_bytes

    @property
    def untidy(self) -> bool:
        """Whether there is something to delete."""
        return bool(self._doomed)

    def __len__(self) -> int:
        """How many sessions have snapshots."""
        return len(self._kept)

    def take_up(self, sessions: Iterable[Session]) -> None:
        """Find the snapshots of these sessions, the least recently used first; others are deleted.

        Raises:
            StoreError: the store cannot be read.
        """
        found: dict[str, dict[int, int]] = {}
        for name, size in self._store.names().items():
            match = _NAME.fullmatch(name)
            if match is not None:
                found.setdefault(match[1], {})[int(match[2])] = size
        with self._lock:
            for session in sessions:
                key = _key(session)
                of_session = found.pop(key, {})
                self._kept[key] = {turns: of_session[turns] for turns in sorted(of_session)}
                self._used_bytes += sum(of_session.values())
                self._drop(key, len(session.turns).__lt__)
            self._doomed += [_name(key, turns) for key, sizes in found.items() for turns in sizes]
            self._make_room(0)

    def turns(self, session: Session) -> Sequence[int]:
        """After which turns of a session there are snapshots that may be of use, the last first."""
        key = _key(session)
        with self._lock:
            kept = self._kept.get(key, ())
            return sorted((turns for turns in kept if (key, turns) not in self._refused), reverse=True)

    def current(self, session: Session) -> bool:
        """Whether there is a snapshot of the cache that an idle session has."""
        return session.cached_turns in self.turns(session)

    def get(self, session: Session, turns: int, most: int) -> bytes | None:
        """The snapshot after so many turns, no more than its first `most` bytes; None if it is gone.

        Raises:
            StoreError: it cannot be read.
        """
        key = _key(session)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
        return self._store.read(_name(key, turns), most)

    def put(self, session: Session, epoch: int, turns: int, parts: Sequence[bytes]) -> bool:
        """Keep the snapshot that was made of a session in an epoch of its; False if it is larger than the
        budget, or of no use any more. What it replaces is there until the next `tidy`.

        Raises:
            StoreError: it could not be written.
        """
        key, size = _key(session), sum(map(len, parts))
        with self._lock:
            if size > self.budget:
                return False
            self._make_room(size, but=key)
        self.tidy()
        try:
            self._store.write(_name(key, turns), parts)
        except BaseException:
            with self._lock:  # it may be there all the same, or what was there before
                self._drop(key, turns.__eq__)
                self._doomed.append(_name(key, turns))
            raise
        with self._lock:
            useful = not session.deleted and session.epoch == epoch
            if useful:
                of_session = self._kept.setdefault(key, {})
                self._refused.discard((key, turns))
                self._used_bytes += size - of_session.get(turns, 0)
                of_session[turns] = size
                self._kept.move_to_end(key)
                kept = sorted(of_session)[-1 - self._earlier :]
                self._drop(key, lambda turns: turns not in kept)
            else:
                self._doomed.append(_name(key, turns))
        return useful

    def forget(self, session: Session, beyond: int = 0) -> None:
        """Keep no snapshots of a session after more than so many turns. Waits for no store."""
        with self._lock:
            self._drop(_key(session), lambda turns: turns > beyond)

    def refuse(self, session: Session, turns: int) -> None:
        """Offer a snapshot of a session no longer that cannot be used. It stays until another takes its
        place: a worker with another key, or of another model, may be the one that is wrong."""
        key = _key(session)
        with self._lock:
            if turns in self._kept.get(key, {}):
                self._refused.add((key, turns))

    def lose(self, session: Session, turns: int) -> None:
        """A snapshot of a session is not there, though nobody here has deleted it."""
        key = _key(session)
        with self._lock:
            of_session = self._kept.get(key, {})
            self._used_bytes -= of_session.pop(turns, 0)
            self._refused.discard((key, turns))
            if not of_session:
                self._kept.pop(key, None)

    def tidy(self) -> None:
        """Delete from the store what is kept no longer.

        Raises:
            StoreError: not all could be deleted; the others are tried again.
        """
        with self._lock:
            doomed, self._doomed = self._doomed, []
        for place, name in enumerate(doomed):
            try:
                self._store.delete(name)
            except BaseException:
                with self._lock:
                    self._doomed = doomed[place:] + self._doomed
                raise

    def close(self) -> None:
        """Let others use the store."""
        self._store.close()

    def _make_room(self, size: int, but: str = "") -> None:
        while self._used_bytes + size > self.budget:
            key = next((key for key in self._kept if key != but), but)
            self._drop(key, lambda turns: True)

    def _drop(self, key: str, which: Callable[[int], bool]) -> None:
        of_session = self._kept.get(key, {})
        for turns in [turns for turns in of_session if which(turns)]:
            self._used_bytes -= of_session.pop(turns)
            self._refused.discard((key, turns))
            self._doomed.append(_name(key, turns))
        if not of_session:
            self._kept.pop(key, None)


def _key(session: Session) -> str:
    """Names a session in the store, where it is no other's, even if that has its id later."""
    return _digest(session.tenant, session.id, session.create_time)


@functools.lru_cache(2**14)
def _digest(tenant: str, id: str, create_time: float) -> str:
    whole = f"{tenant}\0{id}\0{create_time!r}"
    return hashlib.sha256(whole.encode()).hexdigest()[:32]


def _name(key: str, turns: int) -> str:
    return f"{key}-{turns}.snapshot"
