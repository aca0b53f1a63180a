"""What a run may be asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import buzz
from apiary_bench.errors import SettingsError
from apiary_bench.quality.bench import Budget
from apiary_bench.quality.settings import Settings
from apiary_bench.quality.tasks import TASKS


def test_all_tasks_and_policies_by_default() -> None:
    settings = Settings(data=Path("data"))
    assert settings.tasks == tuple(TASKS)
    assert settings.policies == buzz.names()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"tasks": ("poetry",)}, "unknown task 'poetry'; known are wikitext"),
        ({"tasks": ("xsum", "xsum")}, "given twice"),
        ({"policies": ("h2o",), "baseline": "buzz"}, "none of the policies"),
        ({"entries": (0,)}, "entries must be"),
        ({"ratios": (0.5,)}, "ratios must be"),
        ({"entries": (1, 2), "ratios": (2.0, 3.0, 4.0)}, "equally many"),
        ({"limit": 0}, "limit"),
        ({"threads": 0}, "threads"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(SettingsError, match=why):
        Settings(data=Path("data"), **changes)


def test_a_task_runs_once_for_each_budget_that_differs_for_it() -> None:
    settings = Settings(data=Path("data"), entries=(282, 564))
    assert settings.budgets(["entries"]) == [Budget(282, 2.5), Budget(564, 2.5)]
    assert settings.budgets(["ratio"]) == [Budget(282, 2.5)]
    pairs = Settings(data=Path("data"), entries=(282, 564), ratios=(5, 2.5))
    assert pairs.budgets(["entries", "ratio"]) == [Budget(282, 5), Budget(564, 2.5)]
    assert pairs.budgets(["ratio"]) == [Budget(282, 5), Budget(564, 2.5)]
