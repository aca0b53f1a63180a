"""Workers that are ended and started again on one state directory, and first tokens of a session of theirs.

Each repeat has a session of its own: one worker takes its history; the next one its first turn, from the
snapshot; the one after that, which finds the snapshot gone, a turn that computes the cache anew, and then the
warm turns. So all of them are behind nearly the same number of tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

from apiary_bench.errors import LoadError, SettingsError, VoidError
from apiary_bench.own.turn import First, cached, draw, take
from apiary_bench.own.worker import CALL, Workers, meet, temporary
from apiary_bench.progress import Observer, begin
from apiary_client import Capacity, Model, aio

_STORED = 30.0  # seconds that a snapshot may take
_LOOK = 0.01  # seconds between looks whether it is there
_SNAPSHOTS = "snapshots"  # where a worker has them, in its state directory


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is measured.

    Attributes:
        history: tokens of the session.
        input: tokens of each measured turn's input; all answers have one token.
        turns: warm turns of each session.
        others: forks of the session, used after it, so that they come back before it.
        repeats: sessions, one after the other.
        kill: end workers by SIGKILL, once the snapshot is there; else by SIGTERM.

    Raises:
        SettingsError: a value is out of range.
    """

    history: int = 3_000
    input: int = 32
    turns: int = 10
    others: int = 0
    repeats: int = 5
    kill: bool = False

    def __post_init__(self) -> None:
        for name in ("history", "input", "turns", "repeats"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.others < 0:
            raise SettingsError(f"others must be at least 0, not {self.others}")

    @property
    def longest(self) -> int:
        """Tokens of the longest input."""
        return max(self.history, self.input)


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeat:
    """What came of one session.

    Attributes:
        ready: seconds from the start of each of the three processes to its ready line.
        resumed, recomputed: the first turns after ready lines, with the snapshot and without it.
        warm: turns of the last worker after that.
    """

    ready: Sequence[float]
    resumed: First
    recomputed: First
    warm: Sequence[First]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    """What was found: the worker, the bytes of a snapshot, and each repeat. Times are medians, in seconds."""

    model: Model
    capacity: Capacity
    snapshot_bytes: int
    repeats: Sequence[Repeat]

    @property
    def warm(self) -> float:
        """First token of a warm turn."""
        return median(first.seconds for repeat in self.repeats for first in repeat.warm)

    @property
    def resumed(self) -> float:
        """First token after the ready line, with the snapshot."""
        return median(repeat.resumed.seconds for repeat in self.repeats)

    @property
    def recomputed(self) -> float:
        """The same without it."""
        return median(repeat.recomputed.seconds for repeat in self.repeats)

    @property
    def ready(self) -> float:
        """From the start of a process to its ready line."""
        return median(seconds for repeat in self.repeats for seconds in repeat.ready)

    @property
    def slowdown(self) -> float:
        """How many times longer a resumed turn's first token took than a warm one's."""
        return self.resumed / self.warm

    @property
    def gain(self) -> float:
        """How many times longer it would have taken without the snapshot."""
        return self.recomputed / self.resumed


async def run(
    plan: Plan, flags: Mapping[str, str], observe: Observer, directory: Path | None = None
) -> Resume:
    """Start workers, measure, and leave nothing behind.

    Args:
        plan: what is measured.
        flags: of `apiary serve`, without those that say where it listens and what it stores.
        observe: hears of each turn.
        directory: takes the state directory; None: where temporary files are.

    Raises:
        EngineError: a worker does not start.
        LoadError: a turn failed, or its snapshot was not made.
        SettingsError: the worker never takes such turns.
        VoidError: a turn found a cache that it should not have found, or did not find the one that it should.
    """
    with temporary("resume", flags, directory) as workers:
        return await _Restarts(plan, workers, observe).run()


class _Restarts:
    def __init__(self, plan: Plan, workers: Workers, observe: Observer) -> None:
        self._plan = plan
        self._workers = workers
        self._snapshots = workers.state / _SNAPSHOTS
        self._ended = begin(observe, "turns", plan.repeats * (plan.turns + 3))

    async def run(self) -> Resume:
        repeats = [await self._repeat(number) for number in range(self._plan.repeats)]
        return Resume(model=self._model, capacity=self._capacity, snapshot_bytes=self._bytes, repeats=repeats)

    async def _repeat(self, number: int) -> Repeat:
        plan, session, ready = self._plan, f"resume-{number}", list[float]()
        others = [f"{session}-{place}" for place in range(plan.others)]
        async with self._worker(ready) as client:
            self._model, self._capacity = await meet(client, self._plan.longest)
            await client.create_session(session, labels={"made-by": "apiary bench resume"}, timeout=CALL)
            await self._turn(client, session, 1, plan.history)
            for other in others:
                await client.fork_session(session, other, timeout=CALL)
            await self._stored(1, 1 + len(others))
        async with self._worker(ready) as client:
            resumed = cached(await self._turn(client, session, 2), plan.history, "after the start")
        for snapshot in self._snapshots.iterdir():
            snapshot.unlink()
        async with self._worker(ready) as client:
            recomputed = await self._turn(client, session, 3)
            if recomputed.rebuild_reason is None or recomputed.cached_tokens:
                raise VoidError("a turn found its session's cache, whose snapshot was deleted")
            warm = [
                cached(await self._turn(client, session, 4 + place), plan.history, "in a worker that runs")
                for place in range(plan.turns)
            ]
            for name in (session, *others):
                await client.delete_session(name, timeout=CALL)
        return Repeat(ready=ready, resumed=resumed, recomputed=recomputed, warm=warm)

    @asynccontextmanager
    async def _worker(self, ready: list[float]) -> AsyncIterator[aio.Client]:
        began = perf_counter()
        async with self._workers.start() as (process, client):
            ready.append(perf_counter() - began)
            yield client
            if self._plan.kill:
                process.kill()

    async def _turn(self, client: aio.Client, session: str, number: int, tokens: int | None = None) -> First:
        """Take a session's n-th turn, from 1, and wait for its snapshot: it is not to be made beside the next
        turn."""
        ids = draw(self._model, f"resume {session} {number}", tokens or self._plan.input)
        first, _ = await take(client, session, ids)
        await self._stored(number)
        self._ended()
        return first

    async def _stored(self, turns: int, sessions: int = 1) -> None:
        """Wait for the snapshots of so many sessions after so many turns, which their names tell."""
        try:
            async with asyncio.timeout(_STORED):
                while len(found := list(self._snapshots.glob(f"*-{turns}.snapshot"))) < sessions:  # noqa: ASYNC110
                    await asyncio.sleep(_LOOK)
        except TimeoutError:
            raise LoadError(f"a turn had no snapshot after {_STORED:.0f} s") from None
        self._bytes = found[0].stat().st_size
