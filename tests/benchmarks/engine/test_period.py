"""Compaction periods, counted by hand."""

from __future__ import annotations

import pytest

from apiary_bench.engine.period import period
from apiary_bench.errors import SettingsError
from buzz import parse


@pytest.mark.parametrize(
    ("policy", "segments", "rounds"),
    [
        ("h2o(heavy=20,recent=20,block=8)", [1], 8),
        ("window(window=40,block=1)", [1], 1),
        ("h2o(heavy=20,recent=20,block=8)", [1] * 8, 1),
        ("h2o(heavy=20,recent=20,block=8)", [1] * 6, 4),  # 24 tokens
        ("buzz2", [1], 32),
        ("buzz2", [9, *[1] * 23], 1),  # 32 tokens: a prompt and an answer
        # of 61 in the middle 15 were sampled before: each third of them and one of 5 others are 15 again
        ("buzz(sink=2,window=20,threshold=60,stride=5)", [1], 46),
        # 8 are evicted at a time, and 32 quantised
        ("h2o(heavy=100,recent=100,block=8,kivi=4,residual=64)", [1], 32),
    ],
)
def test_how_often_a_round_repeats(policy: str, segments: list[int], rounds: int) -> None:
    assert period(parse(policy).resolve(4096), 1200, segments) == rounds


def test_a_full_cache_never_repeats() -> None:
    with pytest.raises(SettingsError, match=r"full\(bound=900\) never repeats its sizes"):
        period(parse("full(bound=900)"), 100, [1])
