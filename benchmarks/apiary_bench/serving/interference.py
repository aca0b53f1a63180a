"""What a long prompt costs those who stream beside it, and what they cost it.

Some sessions with history stream answers. When each has had enough tokens to tell how long their gaps are, a
long prompt comes; when its first token has come, the streams are cancelled, so that their sessions are as
before for the next time. In between the same prompt runs alone.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from time import perf_counter

from apiary_bench.errors import LoadError, SettingsError
from apiary_bench.progress import Observer
from apiary_bench.serving.generator import settle
from apiary_bench.serving.statistics import Distribution
from apiary_bench.serving.workload import vocabulary
from apiary_client import Capacity, Model, Stopping, aio
from apiary_client.errors import ApiaryError

_CALL = 30.0  # seconds that a call without a turn may take
_LOOK = 0.01  # seconds between looks at what streams have had


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Who runs beside whom.

    Attributes:
        streams: sessions that decode.
        history: tokens that each of them has before.
        prompt: tokens of the long prompt.
        quiet: tokens that each stream has before the prompt comes.
        repeats: times that it is measured, after one that is not.
        policy: cache policy of all; None: the worker's default.

    Raises:
        SettingsError: a value is out of range.
    """

    streams: int = 15
    history: int = 600
    prompt: int = 4000
    quiet: int = 64
    repeats: int = 5
    policy: str | None = None

    def __post_init__(self) -> None:
        for name in ("streams", "history", "prompt", "repeats"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.quiet < 2:
            raise SettingsError(f"quiet must be at least 2, for a gap to be between, not {self.quiet}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Time:
    """One measurement. Times in seconds.

    Attributes:
        alone, beside: from the long prompt's request to its first token, without and with the streams.
        quiet, loaded: the streams' inter-token latencies before the prompt came, and until its first token.
    """

    alone: float
    beside: float
    quiet: Distribution
    loaded: Distribution

    @property
    def slowdown(self) -> float:
        """How many times longer the p99 of the streams' gaps was beside the prompt."""
        return self.loaded.p99 / self.quiet.p99

    @property
    def wait(self) -> float:
        """How many times longer the prompt's first token took beside the streams."""
        return self.beside / self.alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Interference:
    """What was found: the worker as it was, and each time."""

    model: Model
    capacity: Capacity
    times: Sequence[Time]

    @property
    def slowdown(self) -> float:
        """The median of `Time.slowdown`."""
        return median(time.slowdown for time in self.times)

    @property
    def wait(self) -> float:
        """The median of `Time.wait`."""
        return median(time.wait for time in self.times)


@dataclass(slots=True)
class _Stream:
    """When tokens of a session's answer came, by `perf_counter`."""

    session: str
    arrivals: list[float] = field(default_factory=list)

    async def read(self, client: aio.Client, token_ids: Sequence[int], output: int) -> None:
        """To its end, which should not come."""
        async for arrival in _arrivals(client, token_ids, output, self.session):
            self.arrivals.append(arrival)
        raise LoadError(f"a stream ended after {output} tokens, while the long prompt was not done")

    def gaps(self, after: float, until: float) -> list[float]:
        """Those that end after one time and begin before the other."""
        return [end - begin for begin, end in pairwise(self.arrivals) if end > after and begin < until]


async def run(scene: Scene, client: aio.Client, observe: Observer) -> Interference:
    """Create the sessions, measure, and delete the sessions, whatever happens before.

    Raises:
        SettingsError: the worker never takes such turns.
        LoadError: a stream ended too early.
        apiary_client.errors.ApiaryError: the worker cannot be reached, or refused something.
    """
    model = await client.get_model(timeout=_CALL)
    if max(scene.prompt, scene.history) > model.max_prompt_tokens:
        raise SettingsError(f"the worker takes turns of at most {model.max_prompt_tokens} tokens")
    capacity = await client.get_capacity(timeout=_CALL)
    _check_memory(scene, capacity)
    words = vocabulary(model)
    times = []
    async with _sessions(scene, client) as names:
        observe("history", 0, scene.streams)
        for place, name in enumerate(names):
            await _first_token(client, _tokens(words, scene.history, f"history {place}"), session=name)
            observe("history", place + 1, scene.streams)
        observe("times", 0, scene.repeats + 1)
        for number in range(scene.repeats + 1):
            times.append(
                await _measure(scene, client, model, names, _tokens(words, scene.prompt, str(number)))
            )
            observe("times", number + 1, scene.repeats + 1)
    return Interference(model=model, capacity=capacity, times=times[1:])


def _check_memory(scene: Scene, capacity: Capacity) -> None:
    """See whether nobody would have to wait for memory, which would be measured instead."""
    if scene.policy is not None:
        return  # how large its slots are is not known
    turns, slot = scene.streams + 1, capacity.slot_bytes
    needed = capacity.workspaces * capacity.workspace_bytes + 2 * turns * slot
    if needed > capacity.budget_bytes:
        raise SettingsError(
            f"{turns} turns beside each other need a cache budget of {needed:,} bytes on this worker (each "
            f"has two slots of {slot:,}, one for the state before it), and it has {capacity.budget_bytes:,}: "
            f"start it with --cache-budget {-(-needed // 2**20)}MiB, or ask for fewer --streams"
        )


async def _measure(
    scene: Scene, client: aio.Client, model: Model, names: Sequence[str], prompt: Sequence[int]
) -> Time:
    alone = await _first_token(client, prompt, policy=scene.policy)
    streams = [_Stream(name) for name in names]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(stream.read(client, prompt[:1], model.max_tokens)) for stream in streams
            ]
            await _each_has(streams, 1)
            began = perf_counter()
            await _each_has(streams, scene.quiet, after=began)
            sent = perf_counter()
            beside = await _first_token(client, prompt, policy=scene.policy)
            came = perf_counter()
            await _each_has(streams, 1, after=came)
            for task in tasks:
                task.cancel()
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    for name in names:
        await settle(client, name)
    quiet = Distribution.of(gap for stream in streams for gap in stream.gaps(began, sent))
    loaded = Distribution.of(gap for stream in streams for gap in stream.gaps(sent, came))
    if quiet is None or loaded is None:
        raise LoadError("no stream had a gap")
    return Time(alone=alone, beside=beside, quiet=quiet, loaded=loaded)


async def _arrivals(
    client: aio.Client,
    token_ids: Sequence[int],
    output: int,
    session: str | None = None,
    policy: str | None = None,
) -> AsyncGenerator[float]:
    """When each message with tokens came."""
    stopping = Stopping(max_tokens=output, ignore_eos=True)
    async with aclosing(
        client.stream(token_ids=token_ids, session=session, policy=policy, stopping=stopping)
    ) as stream:
        async for delta in stream:
            if delta.token_ids:
                yield perf_counter()


async def _first_token(
    client: aio.Client, token_ids: Sequence[int], session: str | None = None, policy: str | None = None
) -> float:
    """Seconds from the request to its first and only token."""
    sent = perf_counter()
    arrivals = [arrival async for arrival in _arrivals(client, token_ids, 1, session, policy)]
    return arrivals[0] - sent


async def _each_has(streams: Sequence[_Stream], count: int, after: float = 0.0) -> None:
    """Wait until each has had so many tokens after a time."""
    while any(sum(arrival > after for arrival in stream.arrivals) < count for stream in streams):  # noqa: ASYNC110
        await asyncio.sleep(_LOOK)


@asynccontextmanager
async def _sessions(scene: Scene, client: aio.Client) -> AsyncGenerator[Sequence[str]]:
    """Names of sessions, which are deleted at the end. They are drawn here, so that all can be."""
    label = secrets.token_hex(4)
    ids = [f"bench-{label}-{place}" for place in range(scene.streams)]
    labels = {"made-by": "apiary bench interference"}
    try:
        for id in ids:
            await client.create_session(id, policy=scene.policy, labels=labels, timeout=_CALL)
        yield [f"sessions/{id}" for id in ids]
    finally:
        for id in ids:
            with suppress(ApiaryError):
                await client.delete_session(f"sessions/{id}", timeout=_CALL)


def _tokens(words: Sequence[int], count: int, what: str) -> Sequence[int]:
    return random.Random(f"interference {what}").choices(words, k=count)  # noqa: S311 - repeatable, not secret
