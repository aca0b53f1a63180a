"""Steps of the tiny model beside their floors."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, median
from typing import Any

import pytest
import torch

from apiary_bench.engine.workbench import Workbench
from apiary_bench.errors import LoadError, SettingsError
from apiary_bench.roofline.ceilings import Ceilings
from apiary_bench.roofline.floor import Load, Model, floors, operations
from apiary_bench.roofline.part import Part
from apiary_bench.roofline.run import Plan, run
from tests.benchmarks.engine.small import Heard, workbench

BEFORE = Ceilings(threads=1, copy=1e9, read=5e9, gemm=3e9, int8=None)
AFTER = Ceilings(threads=1, copy=2e9, read=4e9, gemm=2e9, int8=None)
BEST = Ceilings(threads=1, copy=2e9, read=5e9, gemm=3e9, int8=None)


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.dtype, bool]]:
    """Ceilings that are never measured; how they were asked for."""
    asked: list[tuple[torch.dtype, bool]] = []

    def measure(dtype: torch.dtype, *, int8: bool) -> Ceilings:
        asked.append((dtype, int8))
        return BEFORE if len(asked) == 1 else AFTER

    monkeypatch.setattr(Ceilings, "measure", measure)
    return asked


def test_whole_periods_of_steps(model_path: Path, measured: list[Any]) -> None:
    bench, heard = workbench(model_path), Heard()
    result = run(bench, Plan(sessions=(1, 3), history=100, steps=13), heard)
    assert measured == [(torch.float32, False)] * 2
    assert (result.ceilings, result.period) == (BEST, 8)
    assert heard.stages["ceilings"] == [(0, 2), (1, 2), (2, 2)]
    assert heard.stages["turns"][-1] == (8, 8)
    assert heard.whole()
    kept = bench.loaded.backend.weight_bytes  # type: ignore[attr-defined]
    model = Model.of(model_path, bench.loaded.geometry, torch.float32, int8=False, kept=kept)
    for row, sessions in zip(result.rows, (1, 3), strict=True):
        assert row.sessions == row.load.rows == sessions
        assert len(row.steps) == 16
        # the cache of 40 evicts 8: steps attend to 34, 35, ... 41 entries
        assert row.load == Load(sessions, sessions * 37.5, 0)
        least = floors(operations(model, bench.policy, row.load), BEST)
        least[Part.ATTENTION] += least.pop(Part.SCORES)  # one kernel does both
        assert row.floor == least
        assert row.least == sum(row.floor.values())
        assert set(row.parts) == set(Part)
        assert sum(row.parts.values()) == pytest.approx(row.mean)
        assert (row.mean, row.median) == (pytest.approx(fmean(row.steps)), median(row.steps))
        assert row.median <= row.p99 <= max(row.steps)


def test_int8_weights_and_a_policy_that_never_compacts(model_path: Path, measured: list[Any]) -> None:
    bench = workbench(model_path, weights="int8", policy="full(bound=100)")
    result = run(bench, Plan(sessions=(2,), history=50, steps=5), Heard())
    assert measured == [(torch.float32, True)] * 2
    (row,) = result.rows
    assert (result.period, len(row.steps), row.parts[Part.SCORES]) == (1, 5, 0.0)
    assert Part.SCORES not in row.floor


def test_where_too_few_steps_are_of_all_nothing_is_reported(model_path: Path) -> None:
    bench = workbench(model_path)
    tight = workbench(model_path, cache_budget=str(bench.needed(1)))
    with pytest.raises(LoadError, match="in 0 steps and not in 8 all 4 sessions decoded"):
        run(tight, Plan(sessions=(4,), history=50, steps=8), Heard())


def test_other_devices_have_no_ceilings_here(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench: Workbench = workbench(model_path)
    monkeypatch.setattr(type(bench.loaded.backend), "device", torch.device("meta"))
    with pytest.raises(SettingsError, match="the model is on meta"):
        run(bench, Plan(), Heard())
