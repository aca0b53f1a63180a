"""Intervals of samples whose intervals are known."""

from __future__ import annotations

import numpy as np
import pytest

from apiary_bench.quality.statistics import Estimate, difference, estimate, mean, perplexity, ratio


def test_the_interval_of_a_mean_is_that_of_the_normal_law() -> None:
    values = np.random.default_rng(1).normal(10, 2, size=400)
    found = estimate(values, mean, seed=0)
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), abs=0.05)


def test_a_sample_without_spread_has_no_width() -> None:
    assert estimate(np.full(7, 0.5), mean, seed=0) == Estimate(0.5, 0.5, 0.5)


def test_perplexity_is_of_the_mean() -> None:
    found = estimate(np.log([2.0, 8.0]), perplexity, seed=0)
    assert (found.value, found.low, found.high) == pytest.approx((4, 2, 8))


def test_a_difference_is_paired() -> None:
    noise = np.random.default_rng(2).normal(0, 100, size=50)
    found = difference(noise + 1, noise, mean, seed=0)
    assert (found.value, found.low, found.high) == pytest.approx((1, 1, 1))


def test_a_ratio_is_paired_and_of_the_numbers() -> None:
    noise = np.random.default_rng(2).uniform(1, 100, size=50)
    found = ratio(0.9 * noise, noise, mean, seed=0)
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((0.9, 0.9, 0.9))
    found = ratio(np.log([2.0, 32.0]), np.log([2.0, 8.0]), perplexity, seed=0)
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((2, 1, 4))


@pytest.mark.parametrize("against", [[0.0, 0.0], [0.0, 1.0]])
def test_there_is_no_ratio_to_nothing(against: list[float]) -> None:
    assert ratio(np.array([1.0, 2.0]), np.array(against), mean, seed=0) is None


def test_the_seed_decides() -> None:
    values = np.random.default_rng(3).normal(size=30)
    assert estimate(values, mean, seed=5) == estimate(values, mean, seed=5)
    assert estimate(values, mean, seed=5) != estimate(values, mean, seed=6)
