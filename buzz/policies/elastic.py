"""Elastic Cache: what a prompt's compaction drops is merged into what it keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from buzz.policies.blockwise import Blockwise
from buzz.policy import Compaction, State, View
from buzz.ranking import top
from buzz.regions import Kind, Region


@dataclass(frozen=True, kw_only=True)
class Elastic(Blockwise):
    """Merging after a prompt, a fixed point of elimination while decoding (Elastic Cache, https://arxiv.org/abs/2407.18121).

    Due when more than `bound = sink + heavy + recent` entries are held; then `rest` stay; `block=1` is the
    paper's budget.

    - After a prompt (more than one entry too many) each head keeps its first `sink` and last `recent`
      entries and, of those between, the ones with the largest score (first wins a tie). Each dropped
      entry is merged into the nearest of the latter (earlier wins a tie), never into a sink or a recent
      one, as in the authors' code: a survivor's key and value become the mean of its own and those merged
      into it, keys moved to the survivor's position first.
    - While decoding (one entry too many) the block before the last `distance` entries goes, unmerged: the
      paper's fixed point, a block wide.

    The paper ranks once, by the prompt's weights averaged over a layer's heads; here every KV head has its
    own score, which goes on accumulating, since a session has many prompts.

    Attributes:
        sink: first entries, always kept.
        heavy: most entries kept by score at the bound.
        recent: most recent entries that a prompt's compaction keeps; 1 in the paper.
        distance: most recent entries that decoding keeps.
    """

    sink: int = 4
    heavy: int = 559
    recent: int = 1
    distance: int = 25

    name: ClassVar[str] = "elastic"
    sizes: ClassVar[tuple[str, ...]] = ("heavy",)

    @property
    def bound(self) -> int:
        return self.sink + self.heavy + self.recent

    @property
    def evictable(self) -> int:
        return min(self.heavy, self.heavy + self.recent + 1 - self.distance)

    @property
    def states(self) -> tuple[State, ...]:
        return (State("score"),)

    def compact(self, view: View) -> Compaction:
        """Merge, or drop at the fixed point: `rest` entries stay."""
        if view.n == self.bound + 1:
            end = view.n - self.distance
            before = view.span(0, self.rest - self.distance)
            return Compaction(torch.cat([before, view.span(end, view.n)], dim=-1))
        last = view.n - self.recent
        between = view.state["score"][..., self.sink : last]
        heavy = top(between, self.rest - self.sink - self.recent) + self.sink
        index = torch.cat([view.span(0, self.sink), heavy, view.span(last, view.n)], dim=-1)
        joined = torch.cat(
            [
                view.span(0, self.sink),
                self.sink + _nearest(heavy, view.span(self.sink, last)),
                view.span(last, view.n) - view.n + index.shape[-1],
            ],
            dim=-1,
        )
        return Compaction(index, merge=joined)

    def regions(self, n: int, sampled: int, seen: int) -> tuple[Region, ...]:
        """Sinks, what the last compaction left between, what has come since, and what every compaction leaves
        of the recent. Left for its score counts as heavy, and so does what decoding left before the block
        that goes: counts do not tell which of the two it was."""
        recent = min(self.recent, self.distance)
        return self._around(Kind.HEAVY, n, seen, sink=self.sink, recent=recent)


def _nearest(places: Tensor, each: Tensor) -> Tensor:
    """Which of `places` `[..., m]`, ascending, is nearest to each of `[..., k]`; the earlier wins a tie."""
    after = torch.searchsorted(places.contiguous(), each.contiguous()).clamp(max=places.shape[-1] - 1)
    before = (after - 1).clamp(min=0)
    nearer = (each - places.gather(-1, before)).abs() <= (places.gather(-1, after) - each).abs()
    return before.where(nearer, after)
