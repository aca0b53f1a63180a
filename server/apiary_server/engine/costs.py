"""What steps cost in seconds, learned from those that ran. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Of the features below: what makes a step of an ordinary load about 1 in each, so that one prior fits all.
_UNITS = (1.0, 16.0, 64.0, 64.0 * 1024)
_PRIOR = 1.0  # variance of each coefficient before the first step, in seconds squared: nothing is known
_NOISE = 0.2  # standard deviation of a step's time, as a part of it
_DRIFT = 0.02  # of a coefficient from step to step, as a part of it: caches warm up, neighbours come and go
_CLIP = 3.0  # standard deviations: what is further off (a swap, a page fault storm) counts as that far
_ENOUGH = 8  # steps with prefill after which prices are evidence


@dataclass(frozen=True, slots=True)
class Work:
    """What a step computes, as far as its time depends on it.

    Attributes:
        rows: decode tokens.
        tokens: prefill tokens.
        pairs: query-key pairs of the prefill's attention.
    """

    rows: int = 0
    tokens: int = 0
    pairs: float = 0.0

    @classmethod
    def of_chunk(cls, tokens: int, context: int) -> Work:
        """A prefill chunk behind `context` entries."""
        return cls(0, tokens, tokens * (context + tokens / 2))

    def __add__(self, other: Work) -> Work:
        return Work(self.rows + other.rows, self.tokens + other.tokens, self.pairs + other.pairs)


class Costs:
    """Seconds of a step = a + b * rows + c * tokens + d * pairs.

    The coefficients follow a random walk that a Kalman filter (Kalman 1960) tracks; they are never negative.
    Its noise is in proportion to the step, so that short steps count like long ones, and what lies far off is
    clipped (Huber 1964). The same steps give the same prices, on any machine.
    """

    def __init__(self) -> None:
        self._price = [0.0] * len(_UNITS)
        self._variance = [[_PRIOR * (i == j) for j in range(len(_UNITS))] for i in range(len(_UNITS))]
        self._prefills = 0

    @property
    def known(self) -> bool:
        """Whether enough prefill was seen for its price to be evidence."""
        return self._prefills >= _ENOUGH

    def observe(self, work: Work, seconds: float) -> None:
        """Learn from a step."""
        self._prefills += work.tokens > 0
        x, price, variance = _features(work), self._price, self._variance
        least = sum(price) / 10  # else a coefficient that is 0 would stay there
        for i, value in enumerate(price):
            variance[i][i] = min(variance[i][i] + (_DRIFT * max(value, least)) ** 2, _PRIOR)
        spread = [sum(p * value for p, value in zip(row, x, strict=True)) for row in variance]
        expected = self.seconds(work)
        noise = (_NOISE * max(expected, seconds)) ** 2
        total = sum(s * value for s, value in zip(spread, x, strict=True)) + noise
        if total <= 0:  # a clock that stood still tells nothing
            return
        most = _CLIP * math.sqrt(total)
        error = max(-most, min(seconds - expected, most)) / total
        for i, gain in enumerate(spread):
            price[i] = max(price[i] + gain * error, 0.0)
            for j, other in enumerate(spread):
                variance[i][j] -= gain * other / total

    def seconds(self, work: Work) -> float:
        """The time of a step; 0 where nothing is known."""
        return sum(price * value for price, value in zip(self._price, _features(work), strict=True))

    def tokens(self, seconds: float, context: int) -> float:
        """How many prefill tokens behind `context` entries make a step that much longer; infinity if nothing
        is known of their price."""
        _, _, token, pair = (price / unit for price, unit in zip(self._price, _UNITS, strict=True))
        first = token + pair * context
        # of first * n + pair * n * n / 2 = seconds, the positive root, in the form that divides by no zero
        divisor = first + math.sqrt(first * first + 2 * pair * max(seconds, 0.0))
        return 2 * max(seconds, 0.0) / divisor if divisor else math.inf


def _features(work: Work) -> tuple[float, ...]:
    counts = (1.0, work.rows, work.tokens, work.pairs)
    return tuple(count / unit for count, unit in zip(counts, _UNITS, strict=True))
