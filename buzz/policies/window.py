"""A sliding window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from buzz.policies.blockwise import Blockwise
from buzz.policy import Compaction, View
from buzz.regions import Kind, Region, in_order


@dataclass(frozen=True, kw_only=True)
class Window(Blockwise):
    """The most recent entries only: the sliding window of Longformer (https://arxiv.org/abs/2004.05150).

    Due when more than `bound = window` entries are held; then the oldest go, and `rest` stay. Models whose
    first tokens serve as attention sinks lose them here, and much of their quality: `streaming` keeps them.

    Attributes:
        window: most recent entries at the bound.
    """

    window: int = 564

    name: ClassVar[str] = "window"
    sizes: ClassVar[tuple[str, ...]] = ("window",)

    @property
    def bound(self) -> int:
        return self.window

    @property
    def evictable(self) -> int:
        return self.window

    def compact(self, view: View) -> Compaction:
        """Keep the most recent: `rest` entries, the same of all heads."""
        return Compaction(view.span(view.n - self.rest, view.n))

    def regions(self, n: int, sampled: int, seen: int) -> tuple[Region, ...]:
        """The window."""
        return in_order(n, (Kind.WINDOW, n))
