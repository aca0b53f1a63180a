"""Whether a long conversation slows down: time per output token at a late turn against an early one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, median

from apiary_bench.engine.bare import Bare
from apiary_bench.engine.decode import warm_up
from apiary_bench.engine.period import period
from apiary_bench.engine.workbench import Workbench
from apiary_bench.errors import SettingsError
from apiary_bench.progress import Observer, begin
from buzz import Policy


@dataclass(frozen=True, slots=True)
class Turns:
    """What is measured.

    Attributes:
        sessions: conversations, all at the same time: each turn begins when all have ended the last.
        history: tokens that each is given before its first turn; None: twice the policy's bound.
        input: tokens of each turn's input.
        output: tokens of each turn's answer, at least two.
        early, late: the turns that are compared, counted from 1.
        average: turns, from each of them on, that are averaged at least; they are made whole compaction
            periods.
        repeats: with new sessions each.
    """

    sessions: int = 1
    history: int | None = None
    input: int = 8
    output: int = 24
    early: int = 3
    late: int = 50
    average: int = 4
    repeats: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of it.

    Attributes:
        history: tokens before the first turn.
        period: turns of one compaction period.
        averaged: turns that are averaged: whole periods.
        tpot: for each repeat, the time per output token of every turn, in seconds: the mean over sessions.
        early, late: the same averaged from the early and from the late turn on: medians over the repeats.
        ratio: late against early within a repeat: the median over the repeats.
    """

    history: int
    period: int
    averaged: int
    tpot: list[list[float]]
    early: float
    late: float
    ratio: float


def run(bench: Workbench, plan: Turns, observe: Observer) -> Result:
    """Measure.

    Raises:
        SettingsError: the policy has no compaction periods, or these turns do not hold whole ones; or the
            history is shorter than the bound; or the cache budget is too small, or more than there is.
    """
    history = 2 * bench.policy.bound if plan.history is None else plan.history
    if history < bench.policy.bound:
        raise SettingsError(
            f"a history of {history} tokens is less than {bench.policy} holds, {bench.policy.bound}: early "
            "turns would have smaller caches than late ones"
        )
    length, averaged = _averaged(bench.policy, plan, history)
    total = plan.late + averaged - 1
    ended = begin(observe, "turns", plan.repeats * total)
    with bench.engine(plan.sessions) as bare:
        asyncio.run(warm_up(bare))
        tpot = [asyncio.run(_conversation(bare, plan, history, total, ended)) for _ in range(plan.repeats)]
    early = [fmean(turns[plan.early - 1 :][:averaged]) for turns in tpot]
    late = [fmean(turns[plan.late - 1 :][:averaged]) for turns in tpot]
    return Result(
        history=history,
        period=length,
        averaged=averaged,
        tpot=tpot,
        early=median(early),
        late=median(late),
        ratio=median(after / before for before, after in zip(early, late, strict=True)),
    )


def _averaged(policy: Policy, plan: Turns, history: int) -> tuple[int, int]:
    """Turns of a compaction period, and turns to average."""
    # a turn first feeds the last token of the turn before, and never its own last
    length = period(policy, history, [plan.input + 1, *[1] * (plan.output - 1)])
    averaged = -(-plan.average // length) * length
    if plan.early + averaged > plan.late:
        raise SettingsError(
            f"a compaction period of {policy} is {length} turns of {plan.input + plan.output} tokens, and "
            f"from turn {plan.early} on there are fewer than {averaged} before turn {plan.late}: choose a "
            "later turn, or longer answers"
        )
    return length, averaged


async def _conversation(
    bare: Bare, plan: Turns, history: int, total: int, ended: Callable[[], None]
) -> list[float]:
    names = bare.create(plan.sessions)
    await bare.turns(names, history, 1)
    tpot = []
    for _ in range(total):
        answers = await bare.turns(names, plan.input, plan.output)
        tpot.append(fmean(answer.tpot for answer in answers))
        ended()
    bare.delete(names)
    return tpot
