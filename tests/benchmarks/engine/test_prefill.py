"""Prompts of the tiny model."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from apiary_bench.engine.prefill import Prefill, run
from tests.benchmarks.engine.small import Heard, workbench


def test_each_length_in_each_repeat(model_path: Path) -> None:
    heard = Heard()
    rows = run(workbench(model_path), Prefill((60, 121, 30, 5000), repeats=3), heard)
    assert [row.tokens for row in rows] == [60, 121, 30, 5000]  # the last is longer than the model
    assert heard.stages == {"prompts": [(done, 12) for done in range(13)]}
    for row in rows:
        assert len(row.samples) == 3
        assert row.seconds == median(row.samples) > 0
        assert row.throughput == median(row.tokens / seconds for seconds in row.samples)
    long, odd, short, longest = rows
    pairs = zip(long.samples, short.samples, strict=True)
    assert long.doubling == median(after / before for after, before in pairs)
    assert (odd.doubling, short.doubling, longest.doubling) == (None, None, None)
