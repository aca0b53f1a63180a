"""Policies at equal memory: each one's bound is chosen so that its average bytes match."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from apiary_bench.quality.memory import Footprint, Trace, footprint, plain_bytes
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
        target_bytes: what its average bytes are measured by; None where it runs as written.
    """

    policy: Policy
    footprint: Footprint
    target_bytes: float | None


def fit(
    policy: Policy,
    trace: Trace,
    entries: float,
    geometry: Geometry,
    most: int,
    match: Literal["bytes", "entries"] = "bytes",
) -> Sized:
    """`policy.sized(bound)` with the bound, up to `most`, whose average is nearest to the target.

    A full cache is never scaled. What a bound holds on average depends on when compactions fall, and some
    rules jump over the target; the nearest bound is taken then, and the caller sees how far off it is. A
    bound that lets scored queries read far more than the target does not count, or a rule could match by
    evicting nothing at first and too much later.

    Args:
        policy: any.
        trace: what the cache will be fed.
        entries: the target; in bytes, that of so many plain entries.
        geometry: of the model.
        most: the largest bound, from the model's positions.
        match: what is averaged: entries count the same whether quantised or not.

    Raises:
        PolicyError: the policy can be scaled to no bound at all.
    """
    if not policy.evicts:
        return Sized(policy, footprint(policy, trace, geometry), None)
    target = plain_bytes(entries, geometry)
    tried: dict[int, Sized] = {}
    distance: dict[int, float] = {}

    def at(bound: int) -> float:
        """The average at a bound; 0 where the policy cannot be so small, infinite where it swings."""
        try:
            scaled = policy.sized(bound)
        except PolicyError:
            return 0.0
        held = footprint(scaled, trace, geometry)
        average = held.bytes if match == "bytes" else plain_bytes(held.entries, geometry)
        if held.highest > _SWING * target:
            return math.inf
        tried[bound] = Sized(scaled, held, target)
        distance[bound] = abs(average / target - 1)
        return average

    low, high = 1, min(most, sum(segment.tokens for segment in trace))
    while low < high:
        middle = (low + high) // 2
        if at(middle) < target:
            low = middle + 1
        else:
            high = middle
    at(low)
    for step in range(1, _NEIGHBOURS + 1):
        if min(distance.values(), default=1) <= _CLOSE:
            break
        at(max(1, low - step))
        at(min(most, low + step))
    if not tried:
        raise PolicyError(f"{policy} cannot be scaled to hold about {entries:g} entries")
    return tried[min(tried, key=lambda bound: distance[bound])]
