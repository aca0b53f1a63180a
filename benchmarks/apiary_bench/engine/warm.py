"""What it takes to keep many conversations warm, and how fast a parked one answers."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from statistics import median

import psutil

from apiary_bench.engine.bare import Bare
from apiary_bench.engine.decode import warm_up
from apiary_bench.engine.workbench import Workbench
from apiary_bench.errors import SettingsError
from apiary_bench.progress import Observer, begin
from apiary_server.sessions.info import State


@dataclass(frozen=True, slots=True)
class Warm:
    """What is measured.

    Attributes:
        sessions: conversations held on one worker.
        history: tokens of each.
        input: tokens of the next turn's input.
        pairs: next turns of a parked and of a resident session that are compared.
    """

    sessions: int = 200
    history: int = 3_000
    input: int = 32
    pairs: int = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of it. Memory in bytes, when all sessions have their history; times in seconds.

    Attributes:
        slot_bytes: of a session, resident or parked.
        resident, parked: sessions.
        used_bytes: of the cache budget: slots and workspaces.
        parked_bytes: in host memory.
        held_bytes: both together.
        full_bytes: keys and values of all tokens of all sessions, as a full cache would hold them.
        rss_before_bytes, rss_bytes: resident set size of the process, with the model loaded and no session,
            and with all. The latter counts the cache budget as far as it was ever touched.
        resident_ttft, parked_ttft: next turns, in pairs.
        ratio: parked against resident: the median over pairs.
        worst: the longest parked one against the median resident one.
    """

    slot_bytes: int
    resident: int
    parked: int
    used_bytes: int
    parked_bytes: int
    held_bytes: int
    full_bytes: int
    rss_before_bytes: int
    rss_bytes: int
    resident_ttft: list[float]
    parked_ttft: list[float]
    ratio: float
    worst: float


def run(bench: Workbench, plan: Warm, observe: Observer) -> Result:
    """Give every session its history, one after the other, and then compare next turns.

    Raises:
        SettingsError: the cache budget holds none of the sessions beside a running turn, or all of them, so
            that none is parked; or it is too small, or more than there is.
    """
    geometry, slot = bench.loaded.geometry, bench.layout.bytes
    with bench.engine(1, parked_budget=plan.sessions * slot) as bare:
        asyncio.run(warm_up(bare))
        rss_before = psutil.Process().memory_info().rss
        names = bare.create(plan.sessions)
        asyncio.run(_fill(bare, names, plan, observe))
        rss = psutil.Process().memory_info().rss
        capacity = bare.engine.capacity()
        if not 1 < capacity.resident_sessions < plan.sessions:
            raise SettingsError(
                f"of {plan.sessions} sessions {capacity.resident_sessions} are resident in a cache budget of "
                f"{capacity.budget_bytes:,} bytes, and a slot has {slot:,}: at least 2 and not all must be"
            )
        resident, parked = asyncio.run(_compare(bare, names, plan, observe))
    entry = geometry.entry_bytes
    return Result(
        slot_bytes=slot,
        resident=capacity.resident_sessions,
        parked=capacity.parked_sessions,
        used_bytes=capacity.used_bytes,
        parked_bytes=capacity.parked_bytes,
        held_bytes=capacity.used_bytes + capacity.parked_bytes,
        full_bytes=plan.sessions * plan.history * entry,
        rss_before_bytes=rss_before,
        rss_bytes=rss,
        resident_ttft=resident,
        parked_ttft=parked,
        ratio=median(far / near for far, near in zip(parked, resident, strict=True)),
        worst=max(parked) / median(resident),
    )


async def _fill(bare: Bare, names: list[str], plan: Warm, observe: Observer) -> None:
    ended = begin(observe, "histories", plan.sessions)
    for name in names:
        await bare.turn(name, plan.history, 1)
        ended()


async def _compare(
    bare: Bare, names: list[str], plan: Warm, observe: Observer
) -> tuple[list[float], list[float]]:
    """First tokens of resident and of parked sessions, drawn at random; which of a pair comes first
    alternates."""
    draw = random.Random(0)  # noqa: S311 - repeatable, not secret
    ttft: dict[State, list[float]] = {State.RESIDENT: [], State.PARKED: []}
    ended = begin(observe, "next turns", plan.pairs)
    for number in range(plan.pairs):
        for state in list(ttft)[:: 1 if number % 2 else -1]:
            name = draw.choice(bare.those(names, state))
            ttft[state].append((await bare.turn(name, plan.input, 1)).ttft)
        ended()
    return ttft[State.RESIDENT], ttft[State.PARKED]
