"""Why entries are in a cache, by the places where they lie."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Kind(enum.Enum):
    """Why an entry is there."""

    PINNED = "pinned"
    """Among the first, which somebody asked to keep."""
    SINK = "sink"
    """Among the first, which always stay."""
    SAMPLED = "sampled"
    """Left by compactions that thin what is old at intervals."""
    CELL = "cell"
    """Left by a compaction as the best of its cell, that is, of its neighbours."""
    HEAVY = "heavy"
    """Left by a compaction for the attention that it received, wherever it lies."""
    MIDDLE = "middle"
    """Older than the window, and no compaction has chosen between it and others yet."""
    WINDOW = "window"
    """Among the most recent, which always stay."""


@dataclass(frozen=True, slots=True)
class Region:
    """The entries from `start` to before `stop` of each layer and head are of one kind."""

    kind: Kind
    start: int
    stop: int


def in_order(n: int, *ends: tuple[Kind, int]) -> tuple[Region, ...]:
    """Regions of `n` entries, in order; none is empty.

    Args:
        n: entries.
        ends: each kind and where its region ends, the last one at `n`; where that is before the end of the
            region before, or beyond `n`, there is less of it, or none.
    """
    found, start = [], 0
    for kind, end in ends:
        stop = min(end, n)
        if stop > start:
            found.append(Region(kind, start, stop))
            start = stop
    return tuple(found)
