"""StreamingLLM: attention sinks and a sliding window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from buzz.policies.blockwise import Blockwise
from buzz.policy import Compaction, View
from buzz.regions import Kind, Region, in_order


@dataclass(frozen=True, kw_only=True)
class Streaming(Blockwise):
    """The first and the most recent entries (StreamingLLM, https://arxiv.org/abs/2309.17453).

    Due when more than `bound = sink + window` entries are held; then the oldest outside the sink go, and
    `rest` stay. `block=1` is the paper's eviction per token.

    Attributes:
        sink: first entries, always kept.
        window: most recent entries at the bound.
    """

    sink: int = 4
    window: int = 560

    name: ClassVar[str] = "streaming"
    sizes: ClassVar[tuple[str, ...]] = ("window",)

    @property
    def bound(self) -> int:
        return self.sink + self.window

    @property
    def evictable(self) -> int:
        return self.window

    def compact(self, view: View) -> Compaction:
        """Keep the sink and the most recent: `rest` entries, the same of all heads."""
        recent = view.span(view.n - (self.rest - self.sink), view.n)
        return Compaction(torch.cat([view.span(0, self.sink), recent], dim=-1))

    def regions(self, n: int, sampled: int, seen: int) -> tuple[Region, ...]:
        """The sink and the window."""
        return in_order(n, (Kind.SINK, self.sink), (Kind.WINDOW, n))
