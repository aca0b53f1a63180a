"""Where sessions last beyond the process: behind one interface, whatever keeps them."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from apiary_server.sessions.session import TurnRecord


class StoreError(OSError):
    """A store cannot be read or written to now; the message says why."""


class StoreForgot(StoreError):
    """A store has lost of what was written to it: it takes what is whole, all turns of each session."""


def reason(error: Exception) -> str:
    """What to tell operators of what failed. Of a fault of ours the log says more, and nobody else should."""
    return str(error) if isinstance(error, StoreError) else f"a fault of ours ({type(error).__name__})"


@dataclass(frozen=True, slots=True)
class StoredSettings:
    """What is kept of a session beside its turns. Times are wall-clock, in seconds since 1970."""

    policy: str
    ttl: float | None
    expire_time: float
    labels: Mapping[str, str]
    create_time: float
    update_time: float


@dataclass(frozen=True, slots=True)
class StoredTurn:
    """A committed turn: what it was, and the tokens that it appended to the transcript."""

    record: TurnRecord
    tokens: array[int]


@dataclass(frozen=True, slots=True)
class StoredSession:
    """A session as it was stored last."""

    tenant: str
    id: str
    settings: StoredSettings
    turns: Sequence[StoredTurn]


@dataclass(frozen=True, slots=True)
class Change:
    """What is to change of a stored session: its settings (None: it is deleted), and the turns that follow
    the first `kept` ones, which stay as they are."""

    tenant: str
    id: str
    settings: StoredSettings | None
    kept: int = 0
    turns: Sequence[StoredTurn] = ()


class Store(Protocol):
    """Keeps sessions. Used by one thread at a time.

    Attributes:
        unread: how many sessions `load` could not read, at the least: a bad page may have had more than one.
    """

    unread: int

    def load(self) -> Iterator[StoredSession]:
        """All sessions that can be read. The others are logged, and kept where no later write touches them.

        Raises:
            StoreError: none can be read.
        """

    def write(self, changes: Sequence[Change]) -> None:
        """Make changes, in order: all or none of them. When this returns, they outlive the machine's power.
        Without any, something is written all the same, so that one sees whether that can be done.

        Raises:
            StoreForgot: nothing was changed, since what was to be kept is not there.
            StoreError: nothing was changed; or, where the store is another machine, nobody knows.
        """

    def close(self) -> None:
        """Let others use it."""


class SnapshotStore(Protocol):
    """Keeps bytes by name: hexadecimal digits, hyphens and dots. Thread-safe."""

    def names(self) -> Mapping[str, int]:
        """All that there are, and how many bytes each has. What a process left half-written is taken away.

        Raises:
            StoreError: they cannot be listed.
        """

    def write(self, name: str, parts: Sequence[bytes]) -> None:
        """Keep the parts, one after the other, in place of what had that name. When this returns, they
        outlive the machine's power; until then a reader finds what was there before.

        Raises:
            StoreError: what was there before is there still, or the new parts are, whole.
        """

    def read(self, name: str, most: int) -> bytes | None:
        """What has a name, if anything has: no more than its first `most` bytes.

        Raises:
            StoreError: it cannot be read.
        """

    def delete(self, name: str) -> None:
        """Keep it no longer, if it is there.

        Raises:
            StoreError: it cannot be deleted.
        """

    def close(self) -> None:
        """Let others use it."""
