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
        sessions: conversations, all at the same time: each turn begins when all have ended the last. So
            many are at early turns, and as many others at late ones.
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


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement: seconds per output token of each averaged turn, means over sessions."""

    early: list[float]
    late: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of it.

    Attributes:
        history: tokens before the first turn.
        period: turns of one compaction period.
        averaged: turns that are averaged: whole periods.
        samples: of each repeat.
        early, late: time per output token in seconds, averaged: medians over the repeats.
        ratio: late against early within a repeat: the median over the repeats.
    """

    history: int
    period: int
    averaged: int
    samples: list[Sample]
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
    ended = begin(observe, "turns", plan.repeats * (plan.early + plan.late - 2 + 2 * averaged))
    with bench.engine(2 * plan.sessions) as bare:
        asyncio.run(warm_up(bare))
        samples = [asyncio.run(_sample(bare, plan, history, averaged, ended)) for _ in range(plan.repeats)]
    return Result(
        history=history,
        period=length,
        averaged=averaged,
        samples=samples,
        early=median(fmean(sample.early) for sample in samples),
        late=median(fmean(sample.late) for sample in samples),
        ratio=median(fmean(sample.late) / fmean(sample.early) for sample in samples),
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


async def _sample(bare: Bare, plan: Turns, history: int, averaged: int, ended: Callable[[], None]) -> Sample:
    """Late turns between early ones of other sessions, so that what else the machine does slows both."""
    early, late = (bare.create(plan.sessions) for _ in range(2))

    async def turn(names: list[str]) -> float:
        answers = await bare.turns(names, plan.input, plan.output)
        ended()
        return fmean(answer.tpot for answer in answers)

    for names, number in ((late, plan.late), (early, plan.early)):
        await bare.turns(names, history, 1)
        for _ in range(number - 1):
            await turn(names)
    sample = Sample([], [])
    for _ in range(averaged):
        sample.early.append(await turn(early))
        sample.late.append(await turn(late))
    bare.delete([*early, *late])
    return sample
