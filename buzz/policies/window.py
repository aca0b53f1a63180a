"""A sliding window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from buzz.policies.blockwise import Blockwise
from buzz.policy import Compaction, View


@dataclass(frozen=True, kw_only=True)
class Window(Blockwise):
    """The most recent entries only: the sliding window of Longformer (https://arxiv.org/abs/2004.05150).

    Due when more than `bound = window` entries are held; then the oldest go, down to
    `bound + 1 - block`. A block of `block` entries goes at a time, because every survivor's position
    moves with each eviction and its key must be rotated. Models whose first tokens serve as attention
    sinks lose them here, and much of their quality: `streaming` keeps them.

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
        """Keep the most recent: index `[rest]`, the same for all heads."""
        return Compaction(torch.arange(view.n - (self.rest), view.n))
