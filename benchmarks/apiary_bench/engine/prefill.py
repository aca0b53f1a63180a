"""How long prompts take until their first token."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from statistics import median

from apiary_bench.engine.bare import Bare
from apiary_bench.engine.decode import warm_up
from apiary_bench.engine.workbench import Workbench
from apiary_bench.progress import Observer, begin


@dataclass(frozen=True, slots=True)
class Prefill:
    """What is measured: prompts of these lengths, each alone in a new session; all of them in each repeat."""

    prompts: tuple[int, ...] = (512, 4_000, 8_000, 16_000)
    repeats: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A prompt's length: medians over the repeats.

    Attributes:
        tokens: of the prompt.
        seconds: from the request to the first token.
        throughput: prompt tokens per second.
        doubling: the time against that of the prompt half as long, within a repeat; None where that was not
            measured.
        samples: the seconds of each repeat.
    """

    tokens: int
    seconds: float
    throughput: float
    doubling: float | None
    samples: list[float]


def run(bench: Workbench, plan: Prefill, observe: Observer) -> list[Row]:
    """Measure.

    Raises:
        SettingsError: the cache budget is too small, or more than there is.
        ApiaryError: the worker takes no such prompt.
    """
    taken: dict[int, list[float]] = {tokens: [] for tokens in plan.prompts}
    ended = begin(observe, "prompts", plan.repeats * len(taken))
    with bench.engine(1) as bare:
        asyncio.run(warm_up(bare))
        for _ in range(plan.repeats):
            for tokens, seconds in taken.items():
                seconds.append(asyncio.run(_first_token(bare, tokens)))
                ended()
    return [_row(tokens, taken) for tokens in taken]


async def _first_token(bare: Bare, tokens: int) -> float:
    (answer,) = await bare.turns(names := bare.create(1), tokens, 1)
    bare.delete(names)
    return answer.ttft


def _row(tokens: int, taken: dict[int, list[float]]) -> Row:
    samples, half = taken[tokens], taken.get(tokens // 2) if tokens % 2 == 0 else None
    return Row(
        tokens=tokens,
        seconds=median(samples),
        throughput=median(tokens / each for each in samples),
        doubling=None if half is None else median(a / b for a, b in zip(samples, half, strict=True)),
        samples=samples,
    )
