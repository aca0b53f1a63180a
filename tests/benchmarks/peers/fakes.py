"""Engines without an engine, and results without a run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from apiary_bench.peers.engine import EngineError, Identity, Turn
from apiary_bench.peers.measures import Measures
from apiary_bench.peers.results import PointResult, Run
from apiary_bench.peers.workload import Load, Point, Rate, Workload
from apiary_bench.serving.record import Outcome, Record

IDENTITY = Identity(
    version="1.2",
    weights="float32",
    cache="f16",
    budget_bytes=2**30,
    settings="two threads",
    positions=1000,
)


@dataclass
class FakeEngine:
    """Answers with the numbers 1, 2, ... at once, a token a piece, after a turn of the event loop.

    Attributes:
        short: turns that get one token less than they asked for, by their place in the order of arrival.
        failing: turns that fail before their second token, likewise.
        stuck: whether answers never come.
    """

    identity: Identity = IDENTITY
    short: tuple[int, ...] = ()
    failing: tuple[int, ...] = ()
    stuck: bool = False
    turns: list[Turn] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    running: int = 0
    most_running: int = 0

    async def take(self, turn: Turn) -> AsyncGenerator[Sequence[int]]:
        """Take a turn."""
        place = len(self.turns)
        self.turns.append(turn)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            for number in range(turn.output - (place in self.short)):
                if place in self.failing and number == 1:
                    raise EngineError("out of memory")
                await asyncio.sleep(3600 if self.stuck else 0)
                yield [number + 1]
        finally:
            self.running -= 1

    async def forget(self, sessions: Iterable[str]) -> None:
        """Note who is forgotten."""
        self.forgotten += sessions

    def memory(self) -> int | None:
        """Three MiB."""
        return 3 * 2**20


@dataclass
class FakePeer:
    """Starts one engine again and again."""

    name: str = "fake"
    engine: FakeEngine = field(default_factory=FakeEngine)
    error: str | None = None
    started: list[str] = field(default_factory=list)
    alone: list[str] = field(default_factory=list)

    @asynccontextmanager
    async def start(self, workload: Workload) -> AsyncIterator[FakeEngine]:
        """Start it, unless it has an error; `alone` has the engines that run."""
        self.started.append(workload.name)
        if self.error is not None:
            raise EngineError(self.error)
        assert self.alone == [], f"{self.alone} runs already"
        self.alone.append(self.name)
        try:
            yield self.engine
        finally:
            self.alone.clear()


def workload(
    *loads: Load, rate: Rate = Rate.OUTPUT, name: str = "small", axis: str | None = None
) -> Workload:
    """Of points with these loads, of the sizes 1, 2, ..."""
    points = (Point(f"no. {number}", number, load) for number, load in enumerate(loads, 1))
    return Workload(name, "a small one", rate, 2**30, tuple(points), axis)


def record(
    session: int,
    *arrivals: float,
    sent: float = 0.0,
    turn: int = 0,
    counts: Sequence[int] = (),
    input: int = 8,
) -> Record:
    """A completed turn whose tokens came at these times, one each unless `counts` says more."""
    counts = tuple(counts) or (1,) * len(arrivals)
    return Record(
        session=session,
        turn=turn,
        sent=sent,
        ended=arrivals[-1],
        arrivals=arrivals,
        arrival_tokens=tuple(counts),
        input=input,
        asked=sum(counts),
        outcome=Outcome.COMPLETED,
    )


def measures(rate: float, **changes: Any) -> Measures:
    """With this rate."""
    given: dict[str, Any] = {
        "rate": rate,
        "step": 0.1,
        "ttft_mean": 0.2,
        "ttft_max": 0.3,
        "turn_mean": 1.0,
        "turn_max": 2.0,
        "memory_bytes": 2**20,
    }
    return Measures(**given | changes)


def run(peer: str, rate: float | None, *, workload: str = "small", repeat: int = 0, **changes: Any) -> Run:
    """Of one point; without a rate it is void."""
    found = None if rate is None else measures(rate, **changes)
    point = PointResult("no. 1", 1, found, "it broke" if rate is None else None)
    return Run(peer, workload, repeat, IDENTITY, (point,))
