"""Every metric against values computed by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from apiary_bench.serving.record import Outcome, Record
from apiary_bench.serving.statistics import Distribution, summarise
from apiary_bench.serving.workload import Objectives
from tests.benchmarks.serving.fake_client import usage

NONE = Objectives()


def record(sent: float, *arrivals: float, **changes: Any) -> Record:
    """A turn of ten tokens in and one out at each of these times, which ends with the last."""
    values: dict[str, Any] = {
        "session": 0,
        "turn": 0,
        "sent": sent,
        "ended": arrivals[-1] if arrivals else 0.0,
        "arrivals": arrivals,
        "arrival_tokens": (1,) * len(arrivals),
        "input": 10,
        "asked": len(arrivals),
        "outcome": Outcome.COMPLETED,
        "usage": usage(10, 100, len(arrivals)),
    }
    return Record(**(values | changes))


def cancelled(sent: float, *arrivals: float) -> Record:
    return record(sent, *arrivals, outcome=Outcome.CANCELLED, usage=None, asked=9)


def failed(sent: float, reason: str, *arrivals: float) -> Record:
    return record(sent, *arrivals, outcome=Outcome.FAILED, usage=None, reason=reason)


@pytest.mark.parametrize("count", [2, 3, 10, 101, 1000])
def test_percentiles_are_numpys(count: int) -> None:
    values = np.random.default_rng(count).exponential(size=count)
    found = Distribution.of(values.tolist())
    assert found is not None
    assert (found.p50, found.p90, found.p99) == pytest.approx(np.percentile(values, [50, 90, 99]))
    assert (found.count, found.mean, found.max) == (count, pytest.approx(values.mean()), values.max())


def test_percentiles_by_hand() -> None:
    assert Distribution.of(range(101)) == Distribution(101, 50, 50, 90, 99, 100)
    assert Distribution.of([3.0, None, 1.0]) == Distribution(
        2, 2.0, 2.0, pytest.approx(2.8), pytest.approx(2.98), 3.0
    )
    assert Distribution.of([0.25]) == Distribution(1, 0.25, 0.25, 0.25, 0.25, 0.25)
    assert Distribution.of([None]) is None


def test_every_metric_of_two_turns() -> None:
    # the first: TTFT 1, gaps 1 and 3, TPOT (5 - 1) / 2; the second: TTFT 2, gap 1, TPOT 1 / 3 (a pair came)
    first = record(0.5, 1.0, 2.0, 5.0)
    second = record(2.0, 2.0, 3.0, arrival_tokens=(2, 2), ended=8.0)
    found = summarise([first, second], NONE)
    assert found.turns == {
        Outcome.COMPLETED: 2,
        Outcome.CANCELLED: 0,
        Outcome.CUT_SHORT: 0,
        Outcome.FAILED: 0,
    }
    assert (found.void, found.reasons) == (False, {})
    assert found.duration == 9.5  # from 0.5 to 2 + 8
    assert (found.input_tokens, found.output_tokens, found.cached_tokens) == (20, 7, 200)
    assert found.tokens_per_message == pytest.approx(7 / 5)
    assert found.request_throughput == pytest.approx(2 / 9.5)
    assert found.output_throughput == pytest.approx(7 / 9.5)
    assert found.total_throughput == pytest.approx(27 / 9.5)
    assert (found.good, found.goodput, found.delay) == (None, None, None)
    assert found.ttft == Distribution(2, 1.5, 1.5, pytest.approx(1.9), pytest.approx(1.99), 2)
    assert found.tpot == Distribution(
        2, pytest.approx(7 / 6), pytest.approx(7 / 6), pytest.approx(11 / 6), pytest.approx(119 / 60), 2
    )
    assert found.itl == Distribution(3, pytest.approx(5 / 3), 1, pytest.approx(2.6), pytest.approx(2.96), 3)
    assert found.e2el == Distribution(2, 6.5, 6.5, pytest.approx(7.7), pytest.approx(7.97), 8)


def test_goodput_is_of_turns_that_kept_all_objectives() -> None:
    records = [
        record(0.0, 1.0, 1.5, 2.0),  # TTFT 1, TPOT 0.5
        record(0.0, 1.0, 2.0, 3.0),  # TTFT 1, TPOT 1
        record(0.0, 3.0, 3.5, 4.0),  # TTFT 3, TPOT 0.5
        record(0.0, 0.5),  # one token: no TPOT
        cancelled(0.0, 0.1, 0.2),
    ]

    def good(**limits: float) -> tuple[int | None, float | None]:
        found = summarise(records, Objectives(**limits))
        return found.good, found.goodput

    assert good(ttft=1.0, tpot=0.5) == (2, 0.5)  # in 4 s; the limits themselves are good
    assert good(ttft=1.0) == (3, 0.75)
    assert good(tpot=0.5) == (3, 0.75)
    assert good(ttft=0.4) == (0, 0.0)
    assert good() == (None, None)


def test_cancelled_turns_count_as_tokens_and_as_nothing_else() -> None:
    found = summarise([record(0.0, 1.0, 2.0), cancelled(0.0, 0.5, 3.0, 4.0)], NONE)
    assert (found.void, found.turns[Outcome.CANCELLED]) == (False, 1)
    assert (found.duration, found.output_tokens, found.input_tokens) == (4.0, 5, 10)
    assert (found.request_throughput, found.output_throughput) == (0.25, 1.25)
    assert found.ttft == Distribution(1, 1.0, 1.0, 1.0, 1.0, 1.0)
    assert found.cached_tokens == 100


def test_nothing_but_cancelled_turns() -> None:
    found = summarise([cancelled(0.0, 2.0)], NONE)
    assert (found.ttft, found.tpot, found.itl, found.e2el) == (None,) * 4
    assert (found.void, found.request_throughput, found.output_throughput) == (False, 0, 0.5)


def test_failures_make_a_run_void_and_are_told_by_reason() -> None:
    good = record(0.0, 1.0, 2.0)
    bad = [failed(1.0, "QUEUE_FULL"), failed(1.0, "INTERNAL", 0.5), failed(1.5, "QUEUE_FULL")]
    found = summarise([good, *bad], NONE)
    assert found.void
    assert found.turns[Outcome.FAILED] == 3
    assert list(found.reasons.items()) == [("QUEUE_FULL", 2), ("INTERNAL", 1)]
    assert (found.output_tokens, found.duration) == (2, 2.0)
    short = summarise([good, record(0.0, 1.0, outcome=Outcome.CUT_SHORT)], NONE)
    assert (short.void, short.reasons, short.turns[Outcome.CUT_SHORT]) == (True, {}, 1)


def test_nothing_that_came_at_all() -> None:
    found = summarise([failed(1.0, "UNAVAILABLE"), failed(2.0, "UNAVAILABLE")], NONE)
    assert (found.tokens_per_message, found.output_throughput, found.itl) == (None, 0, None)


def test_start_delays_are_of_all_turns() -> None:
    found = summarise([record(1.0, 1.0, scheduled=0.5), cancelled(2.0, 1.0)], NONE)
    assert found.delay == Distribution(1, 0.5, 0.5, 0.5, 0.5, 0.5)
