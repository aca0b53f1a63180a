"""What a workload needs of an engine, whoever made it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from apiary_bench.errors import BenchError
from apiary_bench.peers.workload import Workload


class EngineError(BenchError):
    """An engine could not be installed or started, ended by itself, or refused a turn; the message says
    which, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What ran, in words for a table.

    Attributes:
        version: of the engine.
        weights, cache: their precision.
        budget_bytes: memory that the caches of all sessions may take.
        settings: what else was set for it, and why it matters.
        positions: the longest conversation that it takes; None: there is no limit.
    """

    version: str
    weights: str
    cache: str
    budget_bytes: int
    settings: str
    positions: int | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn to be taken.

    Attributes:
        session: which conversation.
        tokens: all of the conversation: what went before, then the input.
        fresh: how many of them, at the end, are the input.
        output: tokens to answer, exactly.
    """

    session: str
    tokens: Sequence[int]
    fresh: int
    output: int


class Engine(Protocol):
    """A running engine. Turns of different sessions may be taken at the same time."""

    @property
    def identity(self) -> Identity:
        """What it is."""

    def take(self, turn: Turn) -> AsyncGenerator[Sequence[int]]:
        """Take a turn, and yield the answer's token ids as they come.

        Raises:
            EngineError: it failed.
        """

    async def forget(self, sessions: Iterable[str]) -> None:
        """Let go of conversations that have ended."""

    def memory(self) -> int | None:
        """Resident bytes of its processes, shared pages counted once; None where that cannot be told."""


class Peer(Protocol):
    """An engine that can be started."""

    @property
    def name(self) -> str:
        """As on the command line and in tables."""

    def start(self, workload: Workload) -> AbstractAsyncContextManager[Engine]:
        """Start it, alone on the machine and sized for a workload; it ends with the context.

        Raises:
            EngineError: it cannot be.
        """
