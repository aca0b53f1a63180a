"""Drives a load against a worker: one event loop, one task a session."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from math import ceil
from time import perf_counter
from typing import TypeAlias

from apiary_bench.errors import LoadError
from apiary_bench.progress import Observer, begin
from apiary_bench.serving import plan
from apiary_bench.serving.plan import Turn
from apiary_bench.serving.record import Outcome, Record, measure
from apiary_bench.serving.workload import Workload, vocabulary
from apiary_client import Capacity, Model, State, aio
from apiary_client.errors import ApiaryError, SessionNotFound

Connect: TypeAlias = Callable[[str | None], aio.Client]

_CALL = 30.0  # seconds that a call without a turn may take
_AT_ONCE = 16  # sessions set up or deleted at once: enough to fill a batch, too few to fill a queue
_SETTLE = 60.0  # seconds that a turn which was not completed may hold its session
_LOOK = 0.01  # seconds between looks at whether it still does


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What came of a workload.

    Attributes:
        model: the served model.
        policy: of the sessions, as the worker writes it.
        before: the worker's capacity before the sessions were created.
        after: the same after their last turns; None if the worker did not answer then.
        records: of the measured turns, in order of session and turn.
        undeleted: names of sessions that could not be deleted.
    """

    model: Model
    policy: str
    before: Capacity
    after: Capacity | None
    records: Sequence[Record]
    undeleted: Sequence[str]


async def run(workload: Workload, connect: Connect, observe: Observer) -> Run:
    """Create the sessions, give them their history, send the measured turns; delete the sessions, whatever
    happens before.

    A measured turn that fails is recorded, and its session goes on with the next one.

    Args:
        workload: what to send.
        connect: makes a tenant's client.
        observe: hears of every turn that ended.

    Raises:
        SettingsError: the worker's model never takes such turns.
        LoadError: a turn before the measured ones failed.
        apiary_client.errors.ApiaryError: the worker cannot be reached, or refuses to create the sessions.
    """
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connect(tenant)) for tenant in workload.tenants]
        model = await clients[0].get_model(timeout=_CALL)
        workload.check(model)
        before = await clients[0].get_capacity(timeout=_CALL)
        load = _Load(workload, model, clients, observe)
        try:
            policy = await load.create()
            await load.prepare()
            records = await load.send()
            after = None
            with suppress(ApiaryError):
                after = await clients[0].get_capacity(timeout=_CALL)
        finally:
            undeleted = await load.delete()
    return Run(model=model, policy=policy, before=before, after=after, records=records, undeleted=undeleted)


class _Load:
    """The sessions of one run. Names are drawn here, so that all can be deleted whatever was answered."""

    def __init__(
        self, workload: Workload, model: Model, clients: Sequence[aio.Client], observe: Observer
    ) -> None:
        self._workload = workload
        self._model = model
        self._vocabulary = vocabulary(model)
        self._observe = observe
        self._clients = [clients[place % len(clients)] for place in range(workload.sessions)]
        label = secrets.token_hex(4)
        self._names = [f"sessions/bench-{label}-{place}" for place in range(workload.sessions)]

    async def create(self) -> str:
        """Create the sessions, and return their policy as the worker writes it."""
        policies = set()

        async def create(place: int) -> None:
            session = await self._clients[place].create_session(
                self._names[place].removeprefix("sessions/"),
                policy=self._workload.policy,
                labels={"made-by": "apiary bench serve"},
                timeout=_CALL,
            )
            policies.add(session.policy)

        await _together(create, self._workload.sessions, at_once=_AT_ONCE)
        return ", ".join(sorted(policies))

    async def delete(self) -> list[str]:
        """Delete the sessions, and return the names of those that could not be."""
        left = []

        async def delete(place: int) -> None:
            try:
                await self._clients[place].delete_session(self._names[place], timeout=_CALL)
            except SessionNotFound:
                pass
            except ApiaryError:
                left.append(self._names[place])

        await _together(delete, self._workload.sessions, at_once=_AT_ONCE)
        return sorted(left)

    async def prepare(self) -> None:
        """Give the sessions their history, then their warm-up turns.

        Raises:
            LoadError: a turn of these was not completed.
        """
        workload, vocabulary = self._workload, self._vocabulary
        longest = self._model.max_prompt_tokens
        await self._unmeasured(
            "history",
            lambda place: plan.history(workload, vocabulary, longest, place),
            turns=ceil(workload.history / longest),
            at_once=_AT_ONCE,
        )
        await self._unmeasured(
            "warm-up",
            lambda place: plan.warmup(workload, vocabulary, place),
            turns=workload.warmup,
            at_once=workload.sessions,
        )

    async def send(self) -> list[Record]:
        """Send the measured turns, and return their records in order of session and turn."""
        turns = plan.measured(self._workload, self._vocabulary)
        ended = begin(self._observe, "turns", self._workload.measured)
        records: list[list[Record]] = [[] for _ in turns]
        began = perf_counter()

        async def drive(place: int) -> None:
            for turn in turns[place]:
                await asyncio.sleep(turn.pause if turn.at is None else began + turn.at - perf_counter())
                records[place].append(await self._measure(turn, began))
                ended()
                if records[place][-1].outcome is not Outcome.COMPLETED:
                    await settle(self._clients[place], self._names[place])

        await _together(drive, len(turns), at_once=len(turns))
        return [record for of_session in records for record in of_session]

    async def _unmeasured(
        self, stage: str, turns_of: Callable[[int], Sequence[Turn]], *, turns: int, at_once: int
    ) -> None:
        if not turns:
            return
        ended = begin(self._observe, stage, turns * self._workload.sessions)

        async def drive(place: int) -> None:
            for turn in turns_of(place):
                record = await self._measure(turn, perf_counter())
                if record.outcome is not Outcome.COMPLETED:
                    why = f"{record.reason}: {record.message}" if record.reason else "it was cut short"
                    raise LoadError(f"{stage} of {self._names[place]}, turn {turn.number}: {why}")
                ended()

        await _together(drive, self._workload.sessions, at_once=at_once)

    async def _measure(self, turn: Turn, began: float) -> Record:
        client, name = self._clients[turn.session], self._names[turn.session]
        return await measure(client, name, turn, began, self._workload.timeout)


async def settle(client: aio.Client, session: str) -> None:
    """Wait until a turn that was not completed no longer holds its session, which would refuse the next.
    What goes wrong here, the next turn will tell."""
    with suppress(ApiaryError, TimeoutError):
        async with asyncio.timeout(_SETTLE):
            while (await client.get_session(session, timeout=_CALL)).state is State.BUSY:  # noqa: ASYNC110
                await asyncio.sleep(_LOOK)


async def _together(do: Callable[[int], Awaitable[None]], count: int, *, at_once: int) -> None:
    """Do all of `count` things, `at_once` at a time. The first failure ends the others and is raised."""
    places = asyncio.Semaphore(at_once)

    async def one(place: int) -> None:
        async with places:
            await do(place)

    try:
        async with asyncio.TaskGroup() as group:
            for place in range(count):
                group.create_task(one(place))
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
