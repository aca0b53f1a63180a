"""What engines are given."""

from __future__ import annotations

import pytest

from apiary_bench.errors import SettingsError
from apiary_bench.peers.workload import GIB, Load, Rate, names, tokens, workloads


def test_the_workloads_are_those_of_the_design() -> None:
    decode, turns, prefill = workloads(["decode", "turns", "prefill"])
    assert [point.load for point in decode.points] == [Load(sessions=16, history=600, input=8, output=64)]
    assert decode.rate is Rate.DECODE
    assert [point.load for point in turns.points] == [
        Load(sessions=16, history=3000, turns=3, input=32, output=32)
    ]
    assert (turns.rate, turns.budget_bytes) == (Rate.OUTPUT, GIB)
    assert [point.load.input for point in prefill.points] == [512, 4000]
    assert {(point.load.parallel, point.load.output, point.load.history) for point in prefill.points} == {
        (1, 1, 0)
    }


def test_growth_goes_to_its_last_sizes() -> None:
    sessions, history = workloads(["growth-sessions", "growth-history"])
    assert [point.load.sessions for point in sessions.points] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert {point.load.history for point in sessions.points} == {600}
    # sizes are of the whole conversation: a model's last position is one of them
    assert [point.load.positions for point in history.points] == [2**power for power in range(8, 16)]
    assert [point.size for point in history.points] == [2**power for power in range(8, 16)]
    assert (sessions.axis, history.axis) == ("sessions", "tokens of the conversation")
    assert not any(workload.axis for workload in workloads(["decode", "turns", "prefill"]))


def test_positions_count_the_answer_to_a_history() -> None:
    assert Load(sessions=1, history=10, turns=2, input=3, output=4).positions == 11 + 2 * 7
    assert Load(sessions=1, input=3, output=4).positions == 7


def test_the_quick_form_has_all_of_them_and_is_small() -> None:
    for quick, full in zip(workloads(names(), quick=True), workloads(names()), strict=True):
        assert (quick.name, quick.rate, quick.budget_bytes) == (full.name, full.rate, full.budget_bytes)
        assert quick.turns < full.turns
        assert max(point.load.positions for point in quick.points) <= 512


def test_turns_count_those_that_give_a_history() -> None:
    decode, turns, prefill = workloads(["decode", "turns", "prefill"])
    assert (decode.turns, turns.turns, prefill.turns) == (32, 64, 6)


def test_they_come_in_the_order_asked_for_and_once() -> None:
    assert [workload.name for workload in workloads(["turns", "decode", "turns"])] == ["turns", "decode"]


def test_an_unknown_one_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(
        SettingsError, match=r"no workload sprint: choose among decode, turns, prefill, growth"
    ):
        workloads(["decode", "sprint"])


def test_tokens_depend_on_seed_and_place_alone() -> None:
    drawn = tokens(1, "a", 200, 300)
    assert drawn == tokens(1, "a", 200, 300)
    assert drawn[:50] == tokens(1, "a", 50, 300)
    assert drawn != tokens(2, "a", 200, 300)
    assert drawn != tokens(1, "b", 200, 300)
    assert min(drawn) >= 100
    assert max(drawn) < 300
