"""After how many tokens a session's work repeats itself."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from apiary_bench.errors import SettingsError
from apiary_bench.quality.memory import Segment, counts
from buzz import Policy

_CYCLES = 3  # that must be alike
_BOUNDS = 8  # times the bound are simulated: room for as many cycles of a policy that halves its cache


def period(policy: Policy, history: int, segments: Sequence[int]) -> int:
    """How often a round of segments is repeated until a session's cache, past its bound, is as it was.

    A policy's compactions come at intervals of its own, and are dear: what is averaged over whole periods
    has as many of them as any other average over whole periods. Found by counting, as sizes depend on counts
    alone.

    Args:
        policy: of the session.
        history: tokens before the first round.
        segments: tokens of each segment of a round: a prompt, or 1 for a generated token.

    Raises:
        SettingsError: the sizes never repeat; a cache that evicts nothing only grows.
    """
    rounds = 4 * _CYCLES + _BOUNDS * policy.bound // sum(segments)
    trace = tuple(Segment(count, 0) for count in (history, *list(segments) * rounds))
    sizes = []
    packed = 0
    for before, after in counts(policy, trace):
        packed = policy.quantised(after, max(0, packed - (before - after)))
        sizes.append((before, after, packed))
    states = _rounds(sizes[1:], len(segments))
    for length in range(1, len(states) // _CYCLES + 1):
        last = states[-_CYCLES * length :]
        if last[length:] == last[:-length]:
            return length
    raise SettingsError(
        f"after {history} tokens the cache of {policy} never repeats its sizes, so there are no compaction "
        "periods to average over: choose a policy that evicts"
    )


def _rounds(sizes: Sequence[tuple[int, int, int]], length: int) -> list[tuple[tuple[int, int, int], ...]]:
    rest = iter(sizes)
    return [tuple(islice(rest, length)) for _ in range(len(sizes) // length)]
