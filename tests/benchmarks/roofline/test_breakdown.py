"""The parts of real steps."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from apiary_bench.roofline import breakdown
from apiary_bench.roofline.breakdown import Breakdown
from apiary_bench.roofline.floor import Load
from apiary_bench.roofline.part import Part
from apiary_server.engine.loop import Loop
from apiary_server.model.backends.cpu.tape import Tape
from apiary_server.model.runner import Runner
from tests.benchmarks.engine.small import workbench
from tests.benchmarks.engine.test_steps import stats


@pytest.mark.parametrize(
    ("setup", "without"),
    [
        ({}, {Part.SCORES}),
        ({"weights": "int8"}, {Part.SCORES}),
        ({"backend": "reference"}, set()),
        ({"backend": "reference", "policy": "corm(budget=40,recent=20)"}, set()),
        ({"policy": "full(bound=300)"}, {Part.SCORES}),
        ({"policy": "h2o(heavy=40,recent=40,kivi=4,residual=32)"}, {Part.SCORES}),
    ],
)
def test_every_part_of_a_step_is_seen(model_path: Path, setup: dict[str, str], without: set[Part]) -> None:
    bench = workbench(model_path, **setup)
    with Breakdown() as seen, bench.engine(3, seen) as bare:
        names = bare.create(3)
        asyncio.run(bare.turns(names, 100, 1))
        asyncio.run(bare.turns(names, 1, 120))
    steps = seen.decoding(3)
    assert 60 < len(steps) <= 120  # they come one after the other, and go so
    assert {part for step in steps for part in step.parts} == set(Part) - without
    for step in steps:
        assert step.seconds == sum(step.parts.values())
        assert min(step.parts.values()) > 0
        assert step.seconds > step.stats.duration  # that leaves out scheduling and delivery
        assert step.load.rows == 3
    most = 3 * (bench.policy.bound + 1)
    assert 100 < max(step.load.entries for step in steps) <= most
    assert (max(step.load.packed for step in steps) > 0) == (bench.policy.kivi is not None)


def test_time_within_another_part_is_the_inner_one_s(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(breakdown, "perf_counter", lambda: now)
    seen = Breakdown()

    def failing() -> None:
        sleep(4)
        raise ValueError

    inner = seen._clocked(Part.SCORES, failing)

    def outer_body() -> None:
        sleep(1)
        with pytest.raises(ValueError):  # noqa: PT011, its own
            inner()
        sleep(2)

    outer = seen._clocked(Part.ATTENTION, outer_body)

    def step(_: object) -> None:
        sleep(8)
        outer()
        other = threading.Thread(target=outer)  # not of the step
        other.start()
        other.join()
        seen.step(stats(1))
        seen._load = Load(1, 2, 0)

    seen._whole(step)(None)  # type: ignore[arg-type]
    (noted,) = seen.steps
    # what the other thread took is time that passed here, too
    assert noted.parts == {Part.OTHER: 8 + 7, Part.ATTENTION: 3, Part.SCORES: 4}
    assert seen.decoding(1) == [noted]
    assert seen.decoding(2) == []


def test_everything_is_as_it_was_afterwards() -> None:
    watched = [(owner, name) for _, owner, name in breakdown._WATCHED]
    watched += [(Tape, "__call__"), (Runner, "run"), (Loop, "step")]
    before = [vars(owner)[name] for owner, name in watched]
    with Breakdown():
        assert all(vars(owner)[name] is not old for (owner, name), old in zip(watched, before, strict=True))
    assert [vars(owner)[name] for owner, name in watched] == before
