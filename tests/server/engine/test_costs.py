"""What steps cost is learned, whatever is in the way."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apiary_server.engine.costs import Costs, Work

PRICES = (0.03, 0.002, 0.0016, 7e-7)  # of a step, a decode token, a prefill token, a pair
KINDS = [  # what is asked of the prices
    Work(1),
    Work(15),
    Work.of_chunk(256, 0),
    Work.of_chunk(256, 3700),
    Work(15) + Work.of_chunk(32, 0),
    Work(15) + Work.of_chunk(32, 3700),
]


def seconds(work: Work) -> float:
    step, row, token, pair = PRICES
    return step + row * work.rows + token * work.tokens + pair * work.pairs


def load(seed: int, steps: int) -> Iterator[Work]:
    """Steps of a busy worker."""
    chance = random.Random(seed)
    for _ in range(steps):
        rows = chance.choice([0, 0, 1, 4, chance.randint(2, 32)])
        tokens = chance.choice([0, 0, 16, 60, 256]) if rows else 256
        yield Work(rows) + (Work.of_chunk(tokens, chance.randint(0, 4000)) if tokens else Work())


def check(costs: Costs, within: float, factor: float = 1.0) -> None:
    for work in KINDS:
        assert costs.seconds(work) == pytest.approx(factor * seconds(work), rel=within), work


def test_nothing_is_known_at_first() -> None:
    costs = Costs()
    assert not costs.known
    assert costs.seconds(Work(5, 100, 1000.0)) == 0
    assert costs.tokens(0.1, 500) == math.inf


def test_prices_are_found() -> None:
    costs = Costs()
    for work in load(0, 300):
        costs.observe(work, seconds(work))
    assert costs.known
    check(costs, 0.05)


@pytest.mark.parametrize("seed", range(10))
def test_noise_and_outliers_do_little(seed: int) -> None:
    costs, chance = Costs(), random.Random(seed)
    for work in load(seed, 300):
        outlier = chance.uniform(2, 20) if chance.random() < 0.03 else 1.0
        costs.observe(work, seconds(work) * chance.lognormvariate(0, 0.1) * outlier)
    check(costs, 0.3)


def test_an_hour_of_decoding_leaves_the_price_of_prefill() -> None:
    costs, chance = Costs(), random.Random(0)
    for work in load(0, 300):
        costs.observe(work, seconds(work))
    before = [costs.tokens(0.1, context) for context in (0, 4000)]
    for _ in range(5000):
        costs.observe(Work(15), seconds(Work(15)) * chance.lognormvariate(0, 0.1))
    assert [costs.tokens(0.1, context) for context in (0, 4000)] == pytest.approx(before, rel=0.15)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_machine_that_changes_is_followed(factor: float) -> None:
    costs = Costs()
    for work in load(0, 300):
        costs.observe(work, seconds(work))
    for work in load(1, 300):
        costs.observe(work, factor * seconds(work))
    check(costs, 0.1, factor)


def test_evidence_is_prefill() -> None:
    costs = Costs()
    for _ in range(100):
        costs.observe(Work(15), 0.06)
    assert not costs.known
    for _ in range(8):
        costs.observe(Work.of_chunk(20, 0), 0.06)
    assert costs.known


def test_a_clock_that_stands_still_is_no_evidence() -> None:
    costs = Costs()
    for _ in range(20):
        costs.observe(Work(1), 0.0)
    assert costs.seconds(Work(1)) == 0


@given(
    st.lists(
        st.tuples(st.integers(0, 64), st.integers(0, 300), st.integers(0, 5000), st.floats(1e-5, 10)),
        min_size=1,
        max_size=40,
    ),
    st.floats(0.001, 10),
    st.integers(0, 5000),
)
def test_a_chunk_of_so_many_tokens_takes_so_long(
    steps: list[tuple[int, int, int, float]], budget: float, context: int
) -> None:
    """Whatever was seen: no price is negative, and `tokens` is the inverse of `seconds`."""
    costs = Costs()
    for rows, tokens, behind, took in steps:
        costs.observe(Work(rows) + Work.of_chunk(tokens, behind), took)
    assert min(costs._prices) >= 0
    count = costs.tokens(budget, context)
    assert costs.tokens(-budget, context) == 0
    if count < 1e6:
        more = costs.seconds(Work(3, count, count * (context + count / 2))) - costs.seconds(Work(3))  # type: ignore[arg-type]
        assert more == pytest.approx(budget, rel=1e-3)
