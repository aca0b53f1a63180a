"""Workers that are ended and started again on one state directory, and first tokens of a session of theirs.

Each repeat has a session of its own: one worker takes its history; the next one its first turn, from the
snapshot; the one after that, which finds the snapshot gone, a turn that computes the cache anew, and then the
warm turns. So all of them are behind nearly the same number of tokens.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

from apiary_bench.errors import LoadError, SettingsError, VoidError
from apiary_bench.peers.apiary import serving
from apiary_bench.progress import Observer, begin
from apiary_bench.serving.workload import vocabulary
from apiary_client import Capacity, Model, Stopping, aio
from apiary_client.errors import ApiaryError

_CALL = 30.0  # seconds that a call without a turn may take
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
class First:
    """A turn's first token.

    Attributes:
        seconds: from the request to it, for the client.
        cached_tokens: that were not computed.
        rebuild_reason: why any were computed again; None: none were.
    """

    seconds: float
    cached_tokens: int
    rebuild_reason: str | None


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
    with TemporaryDirectory(prefix="apiary-resume-", dir=directory) as place:
        try:
            return await _Restarts(plan, flags, Path(place), observe).run()
        except ApiaryError as error:
            raise LoadError(f"{error.reason or error.code.name}: {error.message}") from error


class _Restarts:
    def __init__(self, plan: Plan, flags: Mapping[str, str], place: Path, observe: Observer) -> None:
        self._plan = plan
        self._flags = {**flags, "--state-dir": str(place / "state")}
        self._log = place / "worker.log"
        self._snapshots = place / "state" / _SNAPSHOTS
        self._ended = begin(observe, "turns", plan.repeats * (plan.turns + 3))

    async def run(self) -> Resume:
        repeats = [await self._repeat(number) for number in range(self._plan.repeats)]
        return Resume(model=self._model, capacity=self._capacity, snapshot_bytes=self._bytes, repeats=repeats)

    async def _repeat(self, number: int) -> Repeat:
        plan, session, ready = self._plan, f"resume-{number}", list[float]()
        others = [f"{session}-{place}" for place in range(plan.others)]
        async with self._worker(ready) as client:
            await self._meet(client)
            await client.create_session(session, labels={"made-by": "apiary bench resume"}, timeout=_CALL)
            await self._turn(client, session, 1, plan.history)
            for other in others:
                await client.fork_session(session, other, timeout=_CALL)
            await self._stored(1, 1 + len(others))
        async with self._worker(ready) as client:
            resumed = self._cached(await self._turn(client, session, 2), "after the start")
        for snapshot in self._snapshots.iterdir():
            snapshot.unlink()
        async with self._worker(ready) as client:
            recomputed = await self._turn(client, session, 3)
            if recomputed.rebuild_reason is None or recomputed.cached_tokens:
                raise VoidError("a turn found its session's cache, whose snapshot was deleted")
            warm = [
                self._cached(await self._turn(client, session, 4 + place), "in a worker that runs")
                for place in range(plan.turns)
            ]
            for name in (session, *others):
                await client.delete_session(name, timeout=_CALL)
        return Repeat(ready=ready, resumed=resumed, recomputed=recomputed, warm=warm)

    async def _meet(self, client: aio.Client) -> None:
        self._model = await client.get_model(timeout=_CALL)
        self._capacity = await client.get_capacity(timeout=_CALL)
        if self._plan.longest > self._model.max_prompt_tokens:
            raise SettingsError(f"the worker takes turns of at most {self._model.max_prompt_tokens} tokens")
        self._words = vocabulary(self._model)

    @asynccontextmanager
    async def _worker(self, ready: list[float]) -> AsyncIterator[aio.Client]:
        began = perf_counter()
        async with serving("apiary", self._flags, self._log) as (process, target):
            ready.append(perf_counter() - began)
            async with aio.Client(target) as client:
                yield client
            if self._plan.kill:
                process.kill()

    async def _turn(self, client: aio.Client, session: str, number: int, tokens: int | None = None) -> First:
        """Take a session's n-th turn, from 1, and wait for its snapshot: it is not to be made beside the next
        turn."""
        draw = random.Random(f"resume {session} {number}")  # noqa: S311 - repeatable, not secret
        ids = draw.choices(self._words, k=tokens or self._plan.input)
        stopping = Stopping(max_tokens=1, ignore_eos=True)
        came, usage = None, None
        sent = perf_counter()
        async with aclosing(client.stream(token_ids=ids, session=session, stopping=stopping)) as stream:
            async for delta in stream:
                if delta.token_ids and came is None:
                    came = perf_counter()
                usage = delta.usage
        if came is None or usage is None:
            raise LoadError("an answer ended without a token")
        await self._stored(number)
        self._ended()
        return First(
            seconds=came - sent, cached_tokens=usage.cached_tokens, rebuild_reason=usage.rebuild_reason
        )

    async def _stored(self, turns: int, sessions: int = 1) -> None:
        """Wait for the snapshots of so many sessions after so many turns, which their names tell."""
        try:
            async with asyncio.timeout(_STORED):
                while len(found := list(self._snapshots.glob(f"*-{turns}.snapshot"))) < sessions:  # noqa: ASYNC110
                    await asyncio.sleep(_LOOK)
        except TimeoutError:
            raise LoadError(f"a turn had no snapshot after {_STORED:.0f} s") from None
        self._bytes = found[0].stat().st_size

    def _cached(self, first: First, where: str) -> First:
        """Check that the turn found its session's cache."""
        if first.rebuild_reason is not None or first.cached_tokens < self._plan.history:
            raise VoidError(
                f"a turn {where} found {first.cached_tokens:,} tokens in its session's cache, and at least "
                f"{self._plan.history:,} should be there (rebuild_reason: {first.rebuild_reason or 'none'})"
            )
        return first
