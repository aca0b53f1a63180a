"""Real steps of the real engine, beside their floors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, median

import numpy as np

from apiary_bench.engine.bare import Bare
from apiary_bench.engine.decode import warm_up
from apiary_bench.engine.period import period
from apiary_bench.engine.workbench import Workbench
from apiary_bench.errors import LoadError, SettingsError
from apiary_bench.progress import Observer, begin
from apiary_bench.roofline.breakdown import Breakdown, Step
from apiary_bench.roofline.ceilings import Ceilings
from apiary_bench.roofline.floor import Load, Model, floors, operations
from apiary_bench.roofline.part import Part
from apiary_server.model.backends.cpu import Cpu
from apiary_server.model.catalog import resolve
from apiary_server.threads import apart

_MARGIN = 16  # steps before the measured ones, to warm up


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured.

    Attributes:
        sessions: numbers of sessions, one after the other.
        history: tokens of each session before it decodes.
        steps: measured of each number of sessions, at least; they are made whole compaction periods.
    """

    sessions: tuple[int, ...] = (1, 16, 64)
    history: int = 600
    steps: int = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A number of sessions. Times in seconds.

    Attributes:
        load: means over the steps.
        floor: of each part that has one, at that load.
        parts: the measured time of each part: means over the steps, which add up to `mean`.
        mean, median, p99: of a step.
        steps: of each measured step.
    """

    sessions: int
    load: Load
    floor: dict[Part, float]
    parts: dict[Part, float]
    mean: float
    median: float
    p99: float
    steps: list[float]

    @property
    def least(self) -> float:
        """The floor of a step."""
        return sum(self.floor.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of a plan. `period` is the compaction period in tokens; the steps are whole ones."""

    ceilings: Ceilings
    period: int
    rows: list[Row]


def run(bench: Workbench, plan: Plan, observe: Observer) -> Result:
    """Measure the ceilings, the steps, and the ceilings again, of which the best counts.

    Raises:
        SettingsError: the model does not run on the CPU; or the cache budget is too small, or more than there
            is.
        LoadError: a turn was cut short, or in too few steps all sessions decoded.
    """
    if bench.loaded.backend.device.type != "cpu":
        where = bench.loaded.backend.device
        raise SettingsError(f"ceilings are those of a CPU, and the model is on {where}: choose device cpu")
    policy = bench.policy
    tokens = period(policy, plan.history, [1]) if policy.evicts else 1
    count = -(-plan.steps // tokens) * tokens
    measured_once = begin(observe, "ceilings", 2)
    ceilings = _ceilings(bench)
    measured_once()
    ended = begin(observe, "turns", 2 * sum(plan.sessions))
    measured: dict[int, list[Step]] = {}
    for sessions in plan.sessions:
        with Breakdown() as breakdown, bench.engine(sessions, breakdown) as bare:
            asyncio.run(_decode(bare, plan, sessions, count, ended))
            steps = breakdown.decoding(sessions)[-count:]
        if len(steps) < count:
            raise LoadError(
                f"in {len(steps)} steps and not in {count} all {sessions} sessions decoded: the cache budget "
                "holds fewer"
            )
        measured[sessions] = steps
    ceilings = ceilings.best(_ceilings(bench))
    measured_once()
    loaded = bench.loaded
    kept = loaded.backend.weight_bytes if isinstance(loaded.backend, Cpu) else None
    path, dtype = resolve(bench.settings.model), loaded.backend.dtype
    model = Model.of(path, loaded.geometry, dtype, int8=_int8(bench), kept=kept)

    def floor(load: Load) -> dict[Part, float]:
        return floors(operations(model, policy, load), ceilings)

    rows = [_row(sessions, steps, floor) for sessions, steps in measured.items()]
    return Result(ceilings=ceilings, period=tokens, rows=rows)


def _int8(bench: Workbench) -> bool:
    return bench.settings.weights == "int8"


def _ceilings(bench: Workbench) -> Ceilings:
    return apart(lambda: Ceilings.measure(bench.loaded.backend.dtype, int8=_int8(bench)))


async def _decode(bare: Bare, plan: Plan, sessions: int, count: int, ended: Callable[[], None]) -> None:
    await warm_up(bare)
    names = bare.create(sessions)
    await bare.turns(names, plan.history, 1, ended)
    await bare.turns(names, 1, count + _MARGIN + sessions // 4, ended)  # they begin one after the other


def _row(sessions: int, steps: list[Step], floor: Callable[[Load], dict[Part, float]]) -> Row:
    times = [step.seconds for step in steps]
    load = Load(
        *(fmean(getattr(step.load, name) for step in steps) for name in ("rows", "entries", "packed"))
    )
    least = floor(load)
    if not any(Part.SCORES in step.parts for step in steps):  # recorded by the kernel that attends
        least[Part.ATTENTION] += least.pop(Part.SCORES, 0.0)
    return Row(
        sessions=sessions,
        load=load,
        floor=least,
        parts={part: fmean(step.parts.get(part, 0.0) for step in steps) for part in Part},
        mean=fmean(times),
        median=median(times),
        p99=float(np.percentile(times, 99)),
        steps=times,
    )
