"""H2O: heavy hitters and recent entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from buzz.policy import Compaction, Policy, PolicyError, State, View
from buzz.ranking import top


@dataclass(frozen=True, kw_only=True)
class H2O(Policy):
    """The keys with the most accumulated attention, per head, and the most recent (H2O, https://arxiv.org/abs/2306.14048).

    Due when more than `bound = heavy + recent` entries are held. Then each head keeps its `recent` last
    entries and, of those before, in order, the `heavy + 1 - block` with the largest score (first wins a
    tie); scores go on accumulating. A block of `block` entries goes at a time, because survivors'
    positions move with each eviction and their keys must be rotated; `block=1` is the paper's eviction
    per token.

    Attributes:
        heavy: most heavy hitters at the bound.
        recent: most recent entries, always kept.
        block: entries evicted at a time while decoding, from 1 to `heavy`; by default 32, or `heavy` if
            that is less.
    """

    heavy: int = 282
    recent: int = 282
    block: int = -1

    name: ClassVar[str] = "h2o"
    sizes: ClassVar[tuple[str, ...]] = ("heavy", "recent")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block == -1:
            object.__setattr__(self, "block", max(1, min(32, self.heavy)))
        self._check_bound()
        if not 1 <= self.block <= self.heavy:
            raise PolicyError(f"h2o: block={self.block} is not between 1 and heavy={self.heavy}")

    @property
    def bound(self) -> int:
        return self.heavy + self.recent

    @property
    def states(self) -> tuple[State, ...]:
        return (State("score"),)

    def due(self, n: int, sampled: int) -> bool:
        return n > self.bound

    def compact(self, view: View) -> Compaction:
        """Keep heavy hitters and recent: `bound + 1 - block` entries."""
        older = view.n - self.recent
        heavy = top(view.state["score"][..., :older], self.heavy + 1 - self.block)
        return Compaction(torch.cat([heavy, view.span(older, view.n)], dim=-1))
