"""Many sessions of the tiny model, most of them parked."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import pytest

from apiary_bench.engine.warm import Warm, run
from apiary_bench.errors import SettingsError
from tests.benchmarks.engine.small import Heard, workbench


def test_resident_and_parked(model_path: Path) -> None:
    heard = Heard()
    need = workbench(model_path).needed
    slot = workbench(model_path).layout.bytes
    bench = workbench(model_path, cache_budget=str(need(0) + 3 * slot))  # four slots, one of them in reserve
    result = run(bench, Warm(sessions=9, history=100, input=5, pairs=4), heard)
    assert heard.stages["histories"][-1] == (9, 9)
    assert heard.stages["next turns"][-1] == (4, 4)
    assert heard.whole()
    assert (result.resident, result.parked, result.slot_bytes) == (3, 6, slot)
    assert result.used_bytes == need(0) - slot + 3 * slot  # the workspace is always in use
    assert result.parked_bytes == 6 * slot
    assert result.held_bytes == result.used_bytes + result.parked_bytes
    assert result.full_bytes == 9 * 100 * 2 * (2 * 2 * 32) * 4  # layers, KV heads, head_dim; keys and values
    assert min(result.rss_bytes, result.rss_before_bytes) > 2**26  # torch alone takes more
    assert len(result.resident_ttft) == len(result.parked_ttft) == 4
    pairs = zip(result.parked_ttft, result.resident_ttft, strict=True)
    assert result.ratio == median(parked / resident for parked, resident in pairs)
    assert result.worst == max(result.parked_ttft) / median(result.resident_ttft)


def test_all_must_neither_fit_nor_be_parked(model_path: Path) -> None:
    with pytest.raises(SettingsError, match="of 4 sessions 4 are resident in a cache budget of 67,108,864"):
        run(workbench(model_path, cache_budget="64MiB"), Warm(sessions=4, history=10), Heard())
