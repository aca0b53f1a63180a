"""H2O: heavy hitters and recent entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from buzz.policies.blockwise import Blockwise
from buzz.policy import Compaction, State, View
from buzz.ranking import top
from buzz.regions import Kind, Region


@dataclass(frozen=True, kw_only=True)
class H2O(Blockwise):
    """The keys with the most accumulated attention, per head, and the most recent (H2O, https://arxiv.org/abs/2306.14048).

    Due when more than `bound = heavy + recent` entries are held. Then each head keeps `rest`: its `recent`
    last entries and, of those before, in order, the ones with the largest score (first wins a tie); scores
    go on accumulating. `block=1` is the paper's eviction per token.

    Attributes:
        heavy: most heavy hitters at the bound.
        recent: most recent entries, always kept.
    """

    heavy: int = 282
    recent: int = 282

    name: ClassVar[str] = "h2o"
    sizes: ClassVar[tuple[str, ...]] = ("heavy", "recent")

    @property
    def bound(self) -> int:
        return self.heavy + self.recent

    @property
    def evictable(self) -> int:
        return self.heavy

    @property
    def states(self) -> tuple[State, ...]:
        return (State("score"),)

    def compact(self, view: View) -> Compaction:
        """Keep heavy hitters and recent: `rest` entries."""
        older = view.n - self.recent
        heavy = top(view.state["score"][..., :older], self.rest - self.recent)
        return Compaction(torch.cat([heavy, view.span(older, view.n)], dim=-1))

    def regions(self, n: int, sampled: int, seen: int) -> tuple[Region, ...]:
        """The heavy hitters, what has come since they were chosen, and the recent."""
        return self._around(Kind.HEAVY, n, seen, recent=self.recent)
