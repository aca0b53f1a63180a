"""Policies at equal memory: each one's bound is chosen so that its average bytes match."""

from __future__ import annotations

import math
from dataclasses import dataclass

from apiary_bench.quality.memory import Footprint, Trace, entry_bytes, footprint
from apiary_server.sessions.pool import Geometry
from buzz import Policy, PolicyError

TOLERANCE = 0.02
_SWING = 1.6  # times the target that a scored query may read: what rules that fall far need, and no more
_CLOSE = 0.002  # nearer than that, no better bound is looked for
_NEIGHBOURS = 12  # bounds on each side: shares of a bound are rounded, so a neighbour may fit better


@dataclass(frozen=True, slots=True)
class Sized:
    """A policy as it runs on a document, and the memory that it takes there.

    Attributes:
        policy: scaled.
        footprint: over the document's trace.
        target_bytes: what was to be matched; None where the policy runs as written.
    """

    policy: Policy
    footprint: Footprint
    target_bytes: float | None


def target_bytes(entries: float, geometry: Geometry) -> float:
    """The bytes of `entries` entries a head and layer without states."""
    return entries * geometry.layers * geometry.kv_heads * entry_bytes(geometry, 0)


def fit(policy: Policy, trace: Trace, entries: float, geometry: Geometry, most: int) -> Sized:
    """`policy.sized(bound)` with the bound, up to `most`, whose average bytes are nearest to the target.

    A full cache is never scaled. What a bound holds on average depends on when compactions fall, and some
    rules jump over the target; the nearest bound is taken then, and the caller sees how far off it is. A
    bound that lets scored queries read far more than the target does not count, or a rule could match by
    evicting nothing at first and too much later.

    Args:
        policy: any.
        trace: what the cache will be fed.
        entries: the target, as entries without states.
        geometry: of the model.
        most: the largest bound, from the model's positions.

    Raises:
        PolicyError: the policy can be scaled to no bound at all.
    """
    if not policy.evicts:
        return Sized(policy, footprint(policy, trace, geometry), None)
    target = target_bytes(entries, geometry)
    tried: dict[int, Sized] = {}

    def at(bound: int) -> float:
        """Average bytes at a bound; 0 where the policy cannot be so small, infinite where it swings."""
        try:
            scaled = policy.sized(bound)
        except PolicyError:
            return 0.0
        held = footprint(scaled, trace, geometry)
        if held.highest > _SWING * target:
            return math.inf
        tried[bound] = Sized(scaled, held, target)
        return held.bytes

    low, high = 1, min(most, sum(segment.tokens for segment in trace))
    while low < high:
        middle = (low + high) // 2
        if at(middle) < target:
            low = middle + 1
        else:
            high = middle
    at(low)
    for distance in range(1, _NEIGHBOURS + 1):
        if any(deviation(sized) <= _CLOSE for sized in tried.values()):
            break
        at(max(1, low - distance))
        at(min(most, low + distance))
    if not tried:
        raise PolicyError(f"{policy} cannot be scaled to hold about {entries:g} entries")
    return min(tried.values(), key=deviation)


def deviation(sized: Sized) -> float:
    """How far the average bytes are from the target, relative to it."""
    if sized.target_bytes is None:
        return 0.0
    return abs(sized.footprint.bytes / sized.target_bytes - 1)
