"""CORM: what mattered to recent queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from buzz.policies.blockwise import Blockwise
from buzz.policy import Compaction, PolicyError, State, View
from buzz.ranking import top
from buzz.regions import Kind, Region


@dataclass(frozen=True, kw_only=True)
class Corm(Blockwise):
    """Cache optimisation with recent messages (CORM, https://arxiv.org/abs/2404.15949).

    A key matters to a query if its weight is at least the query's mean weight (one over the keys in view),
    in any of the query heads that share the KV head. A key outside the `recent` last that mattered to none
    of the last `queries` queries goes.

    The paper has no budget, and its heads end up unequally long. Here all heads stay equally long: due
    when more than `bound = budget` entries are held, each head then keeps `rest`, namely the recent ones,
    then those that mattered to the last queries, and within either kind (to cap the one, or to fill up
    with the other) those with more accumulated attention; the first wins a tie.

    Attributes:
        budget: most entries.
        recent: most recent entries, always kept.
        queries: how many of the last queries are asked, w in the paper; at least 1.
    """

    budget: int = 564
    recent: int = 64
    queries: int = 64

    name: ClassVar[str] = "corm"

    def validate(self) -> None:
        super().validate()
        if self.queries < 1:
            raise PolicyError("corm: queries=0 leaves no query to which an entry could matter")

    @property
    def bound(self) -> int:
        return self.budget

    @property
    def evictable(self) -> int:
        return self.budget - self.recent

    @property
    def states(self) -> tuple[State, ...]:
        return (State("score"), State("vote", "vote"))

    def compact(self, view: View) -> Compaction:
        """Keep what is recent and what mattered: `rest` entries."""
        older = view.n - self.recent
        mattered = view.state["vote"][..., :older] >= view.seen - self.queries
        count = self.rest - self.recent
        kept = top(view.state["score"][..., :older], count, preferred=mattered)
        return Compaction(torch.cat([kept, view.span(older, view.n)], dim=-1))

    def regions(self, n: int, sampled: int, seen: int) -> tuple[Region, ...]:
        """What mattered, what has come since that was asked, and the recent."""
        return self._around(Kind.HEAVY, n, seen, recent=self.recent)

    def _scaled(self, bound: int) -> dict[str, int]:
        """The recent entries keep their share."""
        return {"budget": bound, "recent": self.recent * bound // self.budget}
