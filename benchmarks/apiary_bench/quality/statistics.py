"""Intervals of statistics over documents: the percentile bootstrap (Efron 1979)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
Statistic = Callable[[Values], Values]  # reduces the last axis

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A statistic of a sample with its 95% interval."""

    value: float
    low: float
    high: float


def mean(values: Values) -> Values:
    """The mean over documents."""
    return np.asarray(values.mean(axis=-1))


def perplexity(values: Values) -> Values:
    """The exponential of the mean of equally long segments' mean negative log-likelihoods, in nats."""
    return np.asarray(np.exp(values.mean(axis=-1)))


def estimate(values: Values, statistic: Statistic, seed: int) -> Estimate:
    """`statistic` of `values` `[documents]`."""
    return _interval(statistic(values), statistic(values[_resamples(len(values), seed)]))


def difference(values: Values, against: Values, statistic: Statistic, seed: int) -> Estimate:
    """`statistic` of `values` less that of `against`, both `[documents]` of the same documents: paired, so
    each resample takes the same documents of both."""
    index = _resamples(len(values), seed)
    return _interval(
        statistic(values) - statistic(against), statistic(values[index]) - statistic(against[index])
    )


def ratio(values: Values, against: Values, statistic: Statistic, seed: int) -> Estimate | None:
    """`statistic` of `values` as a part of that of `against`, paired as in `difference`. None where the
    latter may be 0, by itself or in a resample: there is no such ratio."""
    index = _resamples(len(values), seed)
    part, whole = statistic(values[index]), statistic(against[index])
    if not statistic(against) or not whole.all():
        return None
    return _interval(statistic(values) / statistic(against), part / whole)


def _resamples(count: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, count, size=(RESAMPLES, count))


def _interval(value: Values, resampled: Values) -> Estimate:
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return Estimate(float(value), float(low), float(high))
