"""What may be asked of a load."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from apiary_bench.errors import SettingsError
from apiary_bench.serving.workload import Arrival, Objectives, Workload, vocabulary
from tests.benchmarks.serving.fake_client import MODEL


def test_the_arrival_process_follows_from_the_rate() -> None:
    assert Workload().arrival is Arrival.CLOSED
    assert not Workload().open
    assert Workload(rate=2.5).arrival is Arrival.POISSON
    assert Workload(rate=2.5).open
    assert Workload(rate=2.5, arrival=Arrival.BURST).arrival is Arrival.BURST


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"sessions": 0}, "sessions must be at least 1, not 0"),
        ({"turns": 0}, "turns must be at least 1, not 0"),
        ({"input": -1}, "input must be at least 1, not -1"),
        ({"output": 0}, "output must be at least 1, not 0"),
        ({"history": -1}, "history must be at least 0, not -1"),
        ({"warmup": -2}, "warmup must be at least 0, not -2"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"think": -0.5}, "think must be at least 0, not -0.5"),
        ({"think": math.inf}, "think must be at least 0, not inf"),
        ({"cancel_rate": 1.25}, "cancel rate must be at least 0 and at most 1, not 1.25"),
        ({"cancel_rate": math.nan}, "cancel rate must be at least 0 and at most 1, not nan"),
        ({"cancel_rate": 0.5, "output": 1}, "ask for 2 or more"),
        ({"timeout": 0.0}, "timeout must be above 0, not 0"),
        ({"rate": 0.0}, "rate must be above 0, not 0"),
        ({"rate": math.inf}, "rate must be above 0, not inf"),
        ({"rate": 1.0, "arrival": Arrival.CLOSED}, "a closed loop has no rate"),
        ({"arrival": Arrival.BURST}, "arrival burst needs a rate"),
        ({"rate": 1.0, "think": 1.0}, "think time is for closed loops"),
        ({"tenants": ()}, "16 sessions are of 1 to 16 tenants, not 0"),
        ({"sessions": 2, "tenants": ("a", "b", "c")}, "2 sessions are of 1 to 2 tenants, not 3"),
    ],
)
def test_what_makes_no_sense_is_refused(values: dict[str, Any], why: str) -> None:
    with pytest.raises(SettingsError, match=why):
        Workload(**values)


@pytest.mark.parametrize("name", ["ttft", "tpot"])
def test_objectives_are_positive(name: str) -> None:
    with pytest.raises(SettingsError, match=f"{name.upper()} in seconds must be above 0, not -1"):
        Objectives(**{name: -1.0})
    assert Objectives(**{name: 0.5}).any
    assert not Objectives().any


@pytest.mark.parametrize(("rate", "cancels"), [(0.0, 0), (0.25, 3), (0.3, 4), (1.0, 12)])
def test_a_part_of_the_turns_is_cancelled(rate: float, cancels: int) -> None:
    workload = Workload(sessions=4, turns=3, cancel_rate=rate)
    assert (workload.measured, workload.cancels) == (12, cancels)


def test_turns_that_the_model_never_takes() -> None:
    Workload(input=100, output=1000).check(MODEL)
    with pytest.raises(SettingsError, match="input must be at most 100, not 101"):
        Workload(input=101).check(MODEL)
    with pytest.raises(SettingsError, match="output must be at most 1000, not 1001"):
        Workload(output=1001).check(MODEL)


def test_the_vocabulary_leaves_out_what_ends_a_turn() -> None:
    assert vocabulary(replace(MODEL, vocab_size=5)) == [1, 3, 4]
