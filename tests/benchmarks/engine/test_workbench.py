"""Engines with just the memory that their sessions need."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from apiary_bench.engine.workbench import Setup, Workbench
from apiary_bench.errors import SettingsError
from apiary_server.errors import InvalidField
from apiary_server.sessions.pool import SlotLayout
from apiary_server.settings import Settings
from tests.benchmarks.engine.small import POLICY, workbench


def test_the_settings_are_the_worker_s(model_path: Path) -> None:
    bench = workbench(model_path, step_tokens=99, cache_dtype="bfloat16")
    assert (str(bench.policy), bench.settings.step_tokens) == (POLICY, 99)
    assert str(bench.loaded.geometry.dtype) == "torch.bfloat16"
    with bench.engine(1) as bare:
        assert bare.engine.model.default_policy == POLICY


def test_by_default_nobody_waits_for_memory(model_path: Path) -> None:
    bench = workbench(model_path)
    workspace = SlotLayout.of_workspace(bench.loaded.geometry, 4096).bytes
    assert bench.needed(5) == workspace + 11 * bench.layout.bytes  # two for each, and one in reserve
    with bench.engine(5) as bare:
        names = bare.create(5)
        asyncio.run(bare.turns(names, 100, 20))  # evicts, so that each has two slots
        asyncio.run(bare.turns(names, 3, 40))
        capacity = bare.engine.capacity()
        assert capacity.budget_bytes == bench.needed(5)
        assert capacity.peak_bytes == workspace + 10 * bench.layout.bytes
        assert (capacity.resident_sessions, capacity.parked_sessions) == (5, 0)


def test_a_budget_that_is_given_is_kept(model_path: Path) -> None:
    bench = workbench(model_path, cache_budget="16MiB")
    with bench.engine(1, parked_budget=7) as bare:
        assert bare.engine.capacity().budget_bytes == 16 * 2**20
        assert bare.engine.capacity().parked_budget_bytes == 7


def test_more_sessions_than_a_worker_runs_at_once(model_path: Path) -> None:
    with workbench(model_path).engine(300) as bare:
        assert bare.engine.capacity().queue_limit == 300
        answers = asyncio.run(bare.turns(bare.create(300), 1, 2))
        assert [answer.tokens for answer in answers] == [2] * 300


@pytest.mark.parametrize(
    ("setup", "why"),
    [
        ({"cache_budget": "much"}, "cache_budget: 'much' is not a size"),
        ({"step_tokens": 0}, "step_tokens: Input should be greater than or equal to 1, got 0"),
    ],
)
def test_settings_that_make_no_sense(model_path: Path, setup: dict[str, Any], why: str) -> None:
    with pytest.raises(SettingsError, match=why):
        workbench(model_path, **setup)


def test_a_policy_that_does_not_fit(model_path: Path) -> None:
    with pytest.raises(InvalidField, match="unknown setting"):
        workbench(model_path, policy="buzz(wings=2)")


def test_a_budget_that_is_too_small(model_path: Path) -> None:
    with pytest.raises(SettingsError, match="a cache budget of 1,024 bytes is too small"):
        workbench(model_path, cache_budget="1KiB").engine(1)


def test_what_is_not_given_is_the_worker_s_default(model_path: Path) -> None:
    path = str(model_path)
    assert Workbench(Setup(model=path)).settings.model_dump() == Settings.load(model=path).model_dump()
