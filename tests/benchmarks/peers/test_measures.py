"""Numbers of records that are known."""

from __future__ import annotations

from dataclasses import replace

import pytest

from apiary_bench.peers.measures import Measures, Void, measure, medians
from apiary_bench.peers.workload import Load, Rate
from apiary_bench.serving.record import Outcome

from .fakes import measures, record

TWO = Load(sessions=2, input=8, output=8)


def test_decoding_counts_from_the_last_ones_first_token_to_the_first_ones_last() -> None:
    # 10 tokens/s each; the second begins two tokens later
    early = record(0, *(0.1 * n for n in range(1, 11)))
    late = record(1, *(0.2 + 0.1 * n for n in range(1, 11)))
    found = measure([early, late], replace(TWO, output=10), Rate.DECODE, None)
    assert found.rate == pytest.approx(20)
    assert found.step == pytest.approx(0.1)


def test_a_slow_beginning_does_not_count_as_decoding() -> None:
    early = record(0, 1.0, *(5.0 + n for n in range(8)))  # waits while the other is read
    late = record(1, *(4.0 + n for n in range(9)))
    found = measure([early, late], replace(TWO, output=9), Rate.DECODE, None)
    assert found.rate == pytest.approx(2)


def test_in_which_order_a_step_sends_its_tokens_does_not_matter() -> None:
    one = [record(0, *map(float, range(1, 9))), record(1, *(n + 0.01 for n in range(1, 9)))]
    other = [record(0, *(n + 0.01 for n in range(1, 9))), record(1, *map(float, range(1, 9)))]
    mixed = [record(0, 1.0, *(n + 0.01 for n in range(2, 9))), record(1, 1.01, *map(float, range(2, 9)))]
    for records in (one, other, mixed):
        assert measure(records, TWO, Rate.DECODE, None).rate == pytest.approx(2, rel=0.01)


def test_sessions_that_stall_count_with_what_they_got() -> None:
    steady = [record(session, *map(float, range(1, 11))) for session in range(3)]
    stalled = record(3, 1.0, 2.0, 3.0, *(11.0 + n for n in range(7)))
    found = measure([*steady, stalled], replace(TWO, sessions=4, output=10), Rate.DECODE, None)
    assert found.rate == pytest.approx((3 * 9 + 2) / 9)


def test_messages_of_several_tokens_count_them_all() -> None:
    counts = (1, 4, 4, 4)
    both = [record(session, 1.0, 2.0, 3.0, 4.0, counts=counts) for session in range(2)]
    found = measure(both, replace(TWO, output=13), Rate.DECODE, None)
    assert found.rate == pytest.approx(8)
    assert found.step == pytest.approx(1 / 4)


def test_sessions_that_hardly_decoded_together_say_nothing() -> None:
    early = record(0, *map(float, range(1, 11)))
    late = record(1, *(7.0 + n for n in range(1, 11)))
    with pytest.raises(Void, match="hardly decoded at the same time"):
        measure([early, late], replace(TWO, output=10), Rate.DECODE, None)
    after = record(1, *(20.0 + n for n in range(1, 11)))
    whole = [record(session, 5.0, counts=(10,)) for session in range(2)]
    for records in ([early, after], whole):
        with pytest.raises(Void, match="hardly decoded at the same time"):
            measure(records, replace(TWO, output=10), Rate.DECODE, None)


def test_answering_is_output_tokens_by_the_time_of_all_turns() -> None:
    records = [
        record(0, 1.0, 2.0),
        record(0, 1.0, 2.0, sent=2.0, turn=1),
        record(1, 3.0, 4.0, sent=0.5),
        record(1, 1.0, 3.5, sent=4.5, turn=1),
    ]
    found = measure(records, Load(sessions=2, turns=2, input=8, output=2), Rate.OUTPUT, 5)
    assert found == Measures(
        rate=pytest.approx(8 / 8.0),
        step=None,
        ttft_mean=pytest.approx(1.5),
        ttft_max=3.0,
        turn_mean=pytest.approx((2 + 2 + 4 + 3.5) / 4),
        turn_max=4.0,
        memory_bytes=5,
    )


def test_reading_is_the_median_of_input_by_time_to_first_token() -> None:
    records = [record(session, at, input=100) for session, at in enumerate((0.5, 1.0, 4.0))]
    found = measure(records, Load(sessions=3, input=100, output=1, at_once=1), Rate.PREFILL, None)
    assert found.rate == pytest.approx(100)
    assert found.ttft_max == 4.0
    assert found.step is None


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.CUT_SHORT])
@pytest.mark.parametrize("rate", list(Rate))
def test_one_turn_that_was_not_completed_voids_all(outcome: Outcome, rate: Rate) -> None:
    good = record(0, *map(float, range(1, 9)))
    bad = replace(good, session=1, turn=2, outcome=outcome, asked=9, message=None)
    with pytest.raises(
        Void, match=r"1 of 2 turns failed; session 1, turn 2: it was cut short, 8 of 9 tokens"
    ):
        measure([good, bad], TWO, rate, None)


def test_medians_are_of_each_number_by_itself() -> None:
    found = medians([measures(3.0, step=0.5), measures(1.0, step=0.1), measures(2.0, step=0.3)])
    assert (found.rate, found.step, found.ttft_max) == (2.0, 0.3, 0.3)


def test_what_one_repeat_lacks_has_no_median() -> None:
    found = medians([measures(3.0, memory_bytes=None), measures(1.0)])
    assert (found.rate, found.memory_bytes) == (2.0, None)
