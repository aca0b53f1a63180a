"""Where sessions last beyond the process: behind one interface, whatever keeps them."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from apiary_server.sessions.session import TurnRecord


class StoreError(OSError):
    """A store cannot be read or written to now; the message says why."""


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
    """Keeps sessions. Used by one thread at a time."""

    def load(self) -> Iterator[StoredSession]:
        """All sessions.

        Raises:
            StoreError: they cannot be read.
        """

    def write(self, changes: Sequence[Change]) -> None:
        """Make changes, in order: all or none of them. When this returns, they outlive the machine's power.

        Raises:
            StoreError: nothing was changed.
        """

    def close(self) -> None:
        """Let others use it."""
