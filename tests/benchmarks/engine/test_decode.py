"""Throughput of the tiny model."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, median

import numpy as np
import pytest

from apiary_bench.engine.decode import Decode, run
from apiary_bench.errors import LoadError
from tests.benchmarks.engine.small import Heard, workbench


def test_every_number_of_sessions_is_measured(model_path: Path) -> None:
    bench, heard = workbench(model_path), Heard()
    rows = run(bench, Decode(sessions=(1, 3), history=10, prompt=70, output=20, repeats=2), heard)
    assert [row.sessions for row in rows] == [1, 3]
    assert heard.stages["turns"][-1] == (24, 24)
    assert heard.whole()
    for row in rows:
        assert len(row.samples) == 2
        for name in ("prefill_throughput", "decode_throughput", "output_throughput"):
            assert getattr(row, name) == median(getattr(sample, name) for sample in row.samples)
        steps = [seconds for sample in row.samples for seconds in sample.steps]
        assert 20 <= len(steps) <= 40  # at most one for each token; sessions may begin one after the other
        assert (row.step_p50, row.step_p99) == pytest.approx(tuple(np.percentile(steps, [50, 99])))
        for sample in row.samples:
            assert sample.decode_throughput == pytest.approx(row.sessions / fmean(sample.steps))
            # all tokens, over a time in which all these steps lie
            assert 0 < sample.output_throughput < row.sessions * 20 / sum(sample.steps)
            assert sample.prefill_throughput > 0
        slots = row.peak_bytes - bench.needed(0) + bench.layout.bytes
        assert 0 < slots <= 2 * row.sessions * bench.layout.bytes
        assert row.budget_bytes == bench.needed(row.sessions)


def test_where_sessions_never_decode_together_nothing_is_reported(model_path: Path) -> None:
    bench = workbench(model_path)
    tight = workbench(model_path, cache_budget=str(bench.needed(1)))
    with pytest.raises(LoadError, match="in no step all 4 sessions decoded"):
        run(tight, Decode(sessions=(4,), prompt=60, output=6, repeats=1), Heard())
