"""Forks of one session under a budget that holds some of them, and the answers of all.

A worker is started twice: the first one says how many bytes a session takes, the second one has a cache
budget for just as many as the plan wants. That one takes the history, makes the forks, and answers them.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

from apiary_bench.errors import SettingsError, VoidError
from apiary_bench.own.turn import First, cached, draw, take
from apiary_bench.own.worker import CALL, meet, temporary, told
from apiary_bench.progress import Observer, begin
from apiary_client import Capacity, Model, aio
from apiary_client.errors import ApiaryError

_SOURCE = "fork"
_LEAST_HELD = 2  # the session, and the fork that is made


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is measured.

    Attributes:
        history: tokens of the session.
        forks: of it, made one after the other.
        holds: sessions that the cache budget holds at once.
        input, output: tokens of the next turn of each of them.
        concurrency: next turns at a time.

    Raises:
        SettingsError: a value is out of range.
    """

    history: int = 3_000
    forks: int = 100
    holds: int = 20
    input: int = 32
    output: int = 8
    concurrency: int = 16

    def __post_init__(self) -> None:
        for name in ("history", "forks", "holds", "input", "output", "concurrency"):
            least = _LEAST_HELD if name == "holds" else 1
            if getattr(self, name) < least:
                raise SettingsError(f"{name} must be at least {least}, not {getattr(self, name)}")

    @property
    def longest(self) -> int:
        """Tokens of the longest input."""
        return max(self.history, self.input)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fork:
    """A fork that was made.

    Attributes:
        seconds: from the request to its answer, for the client.
        displaced: sessions that left the cache budget for it.
        copied_bytes: its own cache, and that of those which were parked for it.
    """

    seconds: float
    displaced: int
    copied_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Forks:
    """What was found: the worker with all sessions, each fork, and what came of their next turns.

    Attributes:
        model, capacity: of the worker, before the first fork.
        forks: in order.
        made, answered: how many sessions were in which state after the last fork, and after the last answer.
        firsts: first tokens of the answers, the session's own first.
    """

    model: Model
    capacity: Capacity
    forks: Sequence[Fork]
    made: Mapping[str, int]
    answered: Mapping[str, int]
    firsts: Sequence[First]

    @property
    def roomy(self) -> Sequence[Fork]:
        """Those for which there was room."""
        return [fork for fork in self.forks if not fork.displaced]

    @property
    def displacing(self) -> Sequence[Fork]:
        """Those for which another session had to leave."""
        return [fork for fork in self.forks if fork.displaced]

    @property
    def copied_bytes(self) -> int:
        """What all of them copied."""
        return sum(fork.copied_bytes for fork in self.forks)

    @property
    def fork(self) -> float | None:
        """The median time of a fork with room, in seconds; None: there was none."""
        return _median(self.roomy)

    @property
    def beyond(self) -> float | None:
        """The same of those beyond the budget."""
        return _median(self.displacing)

    @property
    def first(self) -> float:
        """The median time to the first token of an answer, in seconds."""
        return median(first.seconds for first in self.firsts)


async def run(
    plan: Plan, flags: Mapping[str, str], observe: Observer, directory: Path | None = None
) -> Forks:
    """Start a worker, measure, and leave nothing behind.

    Args:
        plan: what is measured.
        flags: of `apiary serve`, without those that say where it listens, what it stores and its cache
            budget.
        observe: hears of each fork and each answer.
        directory: takes the state directory; None: where temporary files are.

    Raises:
        EngineError: a worker does not start.
        LoadError: a call failed before the answers.
        SettingsError: the worker never takes such turns.
        VoidError: a session did not answer, or not as the others did, or not from its cache; or the budget
            does not hold what it should.
    """
    with temporary("fork", flags, directory) as workers:
        async with workers.start() as (_, client):
            model, capacity = await meet(client, plan.longest)
        budget = {"--cache-budget": str(_budget(capacity, plan.holds))}
        async with workers.start(budget) as (process, client):
            found = await _Forking(plan, model, client, observe).run()
            process.kill()  # what it would store at its end is deleted
            return found


def _budget(capacity: Capacity, holds: int) -> int:
    """The bytes of a cache budget that holds so many sessions."""
    slots = holds + capacity.reserve_slots
    return capacity.workspaces * capacity.workspace_bytes + slots * capacity.slot_bytes


class _Forking:
    def __init__(self, plan: Plan, model: Model, client: aio.Client, observe: Observer) -> None:
        self._plan = plan
        self._model = model
        self._client = client
        self._observe = observe

    async def run(self) -> Forks:
        plan = self._plan
        capacity = await self._capacity()
        if capacity.max_resident_sessions != plan.holds:
            raise VoidError(
                f"the cache budget holds {capacity.max_resident_sessions} sessions, not {plan.holds}"
            )
        await self._client.create_session(_SOURCE, labels={"made-by": "apiary bench fork"}, timeout=CALL)
        await take(self._client, _SOURCE, draw(self._model, "fork history", plan.history))
        names = [f"{_SOURCE}-{number}" for number in range(plan.forks)]
        made = begin(self._observe, "forks", plan.forks)
        forks = []
        for name in names:
            forks.append(await self._fork(name))
            made()
        after_forks = await self._states()
        firsts = await self._answers([_SOURCE, *names])
        return Forks(
            model=self._model,
            capacity=capacity,
            forks=forks,
            made=after_forks,
            answered=await self._states(),
            firsts=firsts,
        )

    async def _fork(self, name: str) -> Fork:
        before = await self._capacity()
        sent = perf_counter()
        await self._client.fork_session(_SOURCE, name, timeout=CALL)
        seconds = perf_counter() - sent
        after = await self._capacity()
        return Fork(
            seconds=seconds,
            displaced=before.resident_sessions + 1 - after.resident_sessions,
            copied_bytes=before.slot_bytes + after.parked_bytes - before.parked_bytes,
        )

    async def _answers(self, names: Sequence[str]) -> Sequence[First]:
        """Have sessions take the same turn, and check that all do, with the answer of the first."""
        ids = draw(self._model, "fork turn", self._plan.input)
        gate = asyncio.Semaphore(self._plan.concurrency)
        ended = begin(self._observe, "answers", len(names))

        async def answer(name: str) -> tuple[First, Sequence[int]] | ApiaryError:
            async with gate:
                try:
                    return await take(self._client, name, ids, self._plan.output)
                except ApiaryError as error:
                    return error
                finally:
                    ended()

        outcomes = await asyncio.gather(*map(answer, names))
        errors = [outcome for outcome in outcomes if isinstance(outcome, ApiaryError)]
        if errors:
            raise VoidError(f"{len(errors)} of {len(names)} sessions did not answer: {told(errors[0])}")
        answers = [outcome for outcome in outcomes if not isinstance(outcome, ApiaryError)]
        differing = sum(tokens != answers[0][1] for _, tokens in answers)
        if differing:
            raise VoidError(f"{differing} of {len(names)} sessions answered otherwise than the first")
        return [cached(first, self._plan.history, "of a fork") for first, _ in answers]

    async def _capacity(self) -> Capacity:
        return await self._client.get_capacity(timeout=CALL)

    async def _states(self) -> Mapping[str, int]:
        listed = self._client.list_sessions(timeout=CALL)
        return Counter([session.state.value async for session in listed])


def _median(forks: Sequence[Fork]) -> float | None:
    return median(fork.seconds for fork in forks) if forks else None
