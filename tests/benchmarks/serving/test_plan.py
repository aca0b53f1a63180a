"""What is sent when, by seed."""

from __future__ import annotations

from itertools import chain, pairwise

import pytest

from apiary_bench.serving import plan
from apiary_bench.serving.workload import Arrival, Workload

VOCABULARY = range(1, 50)


def test_constant_arrivals() -> None:
    workload = Workload(sessions=2, turns=2, rate=4.0, arrival=Arrival.CONSTANT)
    assert plan.arrivals(workload) == [0, 0.25, 0.5, 0.75]
    first, second = plan.measured(workload, VOCABULARY)
    assert [turn.at for turn in first] == [0, 0.5]
    assert [turn.at for turn in second] == [0.25, 0.75]


def test_bursts_are_of_every_session_and_keep_the_rate() -> None:
    workload = Workload(sessions=3, turns=3, rate=6.0, arrival=Arrival.BURST)
    assert plan.arrivals(workload) == [0, 0, 0, 0.5, 0.5, 0.5, 1, 1, 1]
    assert all([turn.at for turn in turns] == [0, 0.5, 1] for turns in plan.measured(workload, VOCABULARY))


def test_poisson_gaps_are_exponential() -> None:
    times = plan.arrivals(Workload(sessions=50, turns=400, rate=8.0, seed=3))
    assert times is not None
    assert len(times) == 20_000
    assert times[0] == 0
    gaps = [after - before for before, after in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    assert min(gaps) >= 0
    assert mean == pytest.approx(1 / 8, rel=0.03)  # its standard error is 0.7%
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert variance == pytest.approx(mean**2, rel=0.1)
    assert sum(gap > mean for gap in gaps) / len(gaps) == pytest.approx(0.3679, abs=0.02)  # 1 / e


def test_a_closed_loop_has_pauses_between_turns_alone() -> None:
    workload = Workload(sessions=100, turns=51, think=0.2)
    assert plan.arrivals(workload) is None
    turns = plan.measured(workload, VOCABULARY)
    assert all(turn.at is None for turn in chain(*turns))
    assert [each[0].pause for each in turns] == [0] * 100
    pauses = [turn.pause for each in turns for turn in each[1:]]
    assert sum(pauses) / 5000 == pytest.approx(0.2, rel=0.06)
    without = plan.measured(Workload(sessions=2, turns=2), VOCABULARY)
    assert [turn.pause for turn in chain(*without)] == [0] * 4


def test_the_seed_decides_all() -> None:
    def drawn(seed: int) -> list[list[plan.Turn]]:
        workload = Workload(sessions=3, turns=4, rate=1.0, cancel_rate=0.5, seed=seed)
        return plan.measured(workload, VOCABULARY)

    assert drawn(1) == drawn(1)
    for what in ("at", "token_ids", "cancel_after"):
        one, other = ([getattr(turn, what) for turn in chain(*drawn(seed))] for seed in (1, 2))
        assert one != other, what


def test_inputs_differ_and_do_not_depend_on_other_sessions() -> None:
    few, many = (plan.measured(Workload(sessions=n, turns=2, input=8), VOCABULARY) for n in (2, 5))
    assert [[turn.token_ids for turn in turns] for turns in many[:2]] == [
        [turn.token_ids for turn in turns] for turns in few
    ]
    inputs = [tuple(turn.token_ids) for turn in chain(*many)]
    assert len(set(inputs)) == len(inputs) == 10
    assert {len(input) for input in inputs} == {8}
    assert set(chain(*inputs)) <= set(VOCABULARY)
    assert [(turn.session, turn.number) for turn in chain(*few)] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_cancellations_are_as_many_as_asked_for_and_within_the_answer() -> None:
    workload = Workload(sessions=10, turns=30, output=5, cancel_rate=0.4)
    turns = list(chain(*plan.measured(workload, VOCABULARY)))
    after = [turn.cancel_after for turn in turns if turn.cancel_after is not None]
    assert len(after) == 120
    assert set(after) == {1, 2, 3, 4}
    every = plan.cancellations(Workload(sessions=2, turns=2, output=2, cancel_rate=1.0))
    assert every == {0: 1, 1: 1, 2: 1, 3: 1}
    assert plan.cancellations(Workload()) == {}


def test_history_that_does_not_fit_a_turn_takes_several() -> None:
    workload = Workload(history=250)
    turns = plan.history(workload, VOCABULARY, 100, 3)
    assert [(turn.session, turn.number, len(turn.token_ids), turn.output) for turn in turns] == [
        (3, 0, 100, 1),
        (3, 1, 100, 1),
        (3, 2, 50, 1),
    ]
    (whole,) = plan.history(workload, VOCABULARY, 250, 3)
    assert list(whole.token_ids) == [token for turn in turns for token in turn.token_ids]
    (other,) = plan.history(workload, VOCABULARY, 250, 4)
    assert other.token_ids != whole.token_ids
    assert plan.history(Workload(history=0), VOCABULARY, 100, 0) == []


def test_warm_up_turns_are_like_measured_ones() -> None:
    workload = Workload(warmup=2, input=6, output=7)
    turns = plan.warmup(workload, VOCABULARY, 1)
    assert [(turn.session, turn.number, len(turn.token_ids), turn.output) for turn in turns] == [
        (1, 0, 6, 7),
        (1, 1, 6, 7),
    ]
    assert all(turn.at is None and turn.cancel_after is None for turn in turns)
