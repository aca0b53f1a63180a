"""Tokens per second of sessions that prefill together and decode together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean, median

import numpy as np

from apiary_bench.engine.bare import Answer, Bare
from apiary_bench.engine.steps import Steps
from apiary_bench.engine.workbench import Workbench
from apiary_bench.errors import LoadError
from apiary_bench.progress import Observer, begin


@dataclass(frozen=True, slots=True)
class Decode:
    """What is measured.

    Attributes:
        sessions: numbers of sessions, one after the other.
        history: tokens that each session is given before, not measured.
        prompt: tokens of the turn that measures prefill; it answers one token.
        output: tokens that the next turn, of one token of input, answers.
        repeats: measurements of each number of sessions, with new sessions each.
    """

    sessions: tuple[int, ...] = (1, 4, 16)
    history: int = 0
    prompt: int = 600
    output: int = 64
    repeats: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One measurement. Tokens per second of all sessions together.

    Attributes:
        prefill_throughput: prompt tokens, from the first request to the last session's first token.
        decode_throughput: of `steps`.
        output_throughput: of the turn that decodes, all its output tokens from the first request to the last
            token. `apiary bench serve --turns 1 --input 1` measures the same through gRPC.
        steps: seconds of each step in which all sessions decoded, and nothing else was computed.
    """

    prefill_throughput: float
    decode_throughput: float
    output_throughput: float
    steps: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A number of sessions: medians over the repeats, and percentiles of all their steps in seconds; of the
    cache budget, the most bytes that were ever used, workspaces included."""

    sessions: int
    prefill_throughput: float
    decode_throughput: float
    output_throughput: float
    step_p50: float
    step_p99: float
    budget_bytes: int
    peak_bytes: int
    samples: list[Sample]


def run(bench: Workbench, plan: Decode, observe: Observer) -> list[Row]:
    """Measure every number of sessions.

    Raises:
        SettingsError: the cache budget is too small, or more than there is.
        LoadError: a turn was cut short, or in no step all sessions decoded.
    """
    turns = 3 if plan.history else 2
    ended = begin(observe, "turns", turns * plan.repeats * sum(plan.sessions))
    rows = []
    for sessions in plan.sessions:
        steps = Steps()
        with bench.engine(sessions, steps) as bare:
            asyncio.run(warm_up(bare))
            samples = [asyncio.run(_sample(bare, steps, plan, sessions, ended)) for _ in range(plan.repeats)]
            capacity = bare.engine.capacity()
        p50, p99 = np.percentile(list(chain.from_iterable(sample.steps for sample in samples)), [50, 99])
        rows.append(
            Row(
                sessions=sessions,
                prefill_throughput=median(sample.prefill_throughput for sample in samples),
                decode_throughput=median(sample.decode_throughput for sample in samples),
                output_throughput=median(sample.output_throughput for sample in samples),
                step_p50=float(p50),
                step_p99=float(p99),
                budget_bytes=capacity.budget_bytes,
                peak_bytes=capacity.peak_bytes,
                samples=samples,
            )
        )
    return rows


async def warm_up(bare: Bare) -> None:
    """A short turn that nobody measures: what happens once, such as the first call of a kernel, happens."""
    await bare.turns(names := bare.create(1), 32, 8)
    bare.delete(names)


async def _sample(bare: Bare, steps: Steps, plan: Decode, sessions: int, ended: Callable[[], None]) -> Sample:
    names = bare.create(sessions)
    if plan.history:
        await bare.turns(names, plan.history, 1, ended)
    filled = await bare.turns(names, plan.prompt, 1, ended)
    steps.clear()
    answers = await bare.turns(names, 1, plan.output, ended)
    decoding = steps.decoding(sessions)
    bare.delete(names)
    if not decoding:
        raise LoadError(
            f"in no step all {sessions} sessions decoded: answers of {plan.output} tokens are too short for "
            "that, or the cache budget too small"
        )
    return Sample(
        prefill_throughput=sessions * plan.prompt / _duration(filled),
        decode_throughput=sessions / fmean(decoding),
        output_throughput=sessions * plan.output / _duration(answers),
        steps=decoding,
    )


def _duration(answers: Sequence[Answer]) -> float:
    """From the first request to the last token, in seconds."""
    return max(answer.last for answer in answers) - min(answer.sent for answer in answers)
