"""What steps cost in seconds, learned from those that ran. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass

_KEEP = 0.95  # of the weight of older steps, when one more of their kind comes: the last 20 count
_SWEEPS = 8  # of coordinate descent after each step; it goes on from the prices before
_TRUSTED = 16  # steps of a kind after which what is expected of the next one is trusted
_MOST = 2.0  # times what is expected: a step that took longer (a swap, a busy neighbour) counts as that long
_ENOUGH = 8  # steps with prefill after which its price is evidence


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
    """Seconds of a step = a + b * rows + c * tokens + d * pairs, where no price is negative.

    The prices are the least squares of relative errors over recent steps. Steps with decode, with prefill,
    and with both are remembered apart, so that an hour of decoding leaves the price of prefill as it was.
    What evidence cannot tell apart counts as a step's own, so that nothing is dear before it is known to be.
    The same steps give the same prices.
    """

    def __init__(self) -> None:
        self._prices = [0.0] * 4
        # by kind of step, see `_kind`: the normal equations, their right side last; lists, since arrays of so
        # few numbers take three times as long between two steps, which leave the processor's caches cold
        self._equations = [[[0.0] * 5 for _ in range(4)] for _ in range(4)]
        self._steps = [0] * 4

    @property
    def known(self) -> bool:
        """Whether enough prefill was seen for its price to be evidence."""
        return sum(self._steps[1::2]) >= _ENOUGH

    def observe(self, work: Work, seconds: float) -> None:
        """Learn from a step."""
        kind = _kind(work)
        expected, scale = self.seconds(work), seconds
        if self._steps[kind] >= _TRUSTED and expected > 0:
            seconds, scale = min(seconds, _MOST * expected), expected
        if scale <= 0:  # a clock that stood still tells nothing
            return
        row = [part / scale for part in (1.0, work.rows, work.tokens, work.pairs, seconds)]
        self._steps[kind] += 1
        self._equations[kind] = [
            [_KEEP * old + mine * other for old, other in zip(equation, row, strict=True)]
            for mine, equation in zip(row, self._equations[kind], strict=False)
        ]
        equations = [list(map(sum, zip(*kinds, strict=True))) for kinds in zip(*self._equations, strict=True)]
        prices = self._prices
        for _ in range(_SWEEPS):
            for i, (a, b, c, d, right) in enumerate(equations):
                if equations[i][i] > 0:
                    rest = right - (a * prices[0] + b * prices[1] + c * prices[2] + d * prices[3])
                    prices[i] = max(prices[i] + rest / equations[i][i], 0.0)

    def seconds(self, work: Work) -> float:
        """The time of a step; 0 where nothing is known."""
        a, b, c, d = self._prices
        return a + b * work.rows + c * work.tokens + d * work.pairs

    def tokens(self, seconds: float, context: int) -> float:
        """How many prefill tokens behind `context` entries make a step that much longer; infinity if nothing
        is known of their price."""
        _, _, token, pair = self._prices
        if seconds < 0:
            return 0.0
        if not token + pair:
            return math.inf
        # of first * n + pair * n * n / 2 = seconds, the positive root, in the form that divides by no zero
        first = token + pair * context
        divisor = first + math.sqrt(first * first + 2 * pair * seconds)
        return 2 * seconds / divisor if divisor else 0.0


def _kind(work: Work) -> int:
    """Which of the four kinds of steps this is: the odd ones have prefill, the last two decode."""
    return 2 * (work.rows > 0) + (work.tokens > 0)
