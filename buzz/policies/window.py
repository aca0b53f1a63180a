"""A sliding window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from buzz.policy import Compaction, Policy, PolicyError, View


@dataclass(frozen=True, kw_only=True)
class Window(Policy):
    """The most recent entries only: the sliding window of Longformer (https://arxiv.org/abs/2004.05150).

    Due when more than `bound = window` entries are held; then the oldest go, down to
    `bound + 1 - block`. A block of `block` entries goes at a time, because every survivor's position
    moves with each eviction and its key must be rotated. Models whose first tokens serve as attention
    sinks lose them here, and much of their quality: `streaming` keeps them.

    Attributes:
        window: most recent entries at the bound.
        block: entries evicted at a time while decoding, from 1 to `window`; by default 32, or `window` if
            that is less.
    """

    window: int = 564
    block: int = -1

    name: ClassVar[str] = "window"
    sizes: ClassVar[tuple[str, ...]] = ("window",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block == -1:
            object.__setattr__(self, "block", max(1, min(32, self.window)))
        self._check_bound()
        if not 1 <= self.block <= self.window:
            raise PolicyError(f"window: block={self.block} is not between 1 and window={self.window}")

    @property
    def bound(self) -> int:
        return self.window

    def due(self, n: int, sampled: int) -> bool:
        return n > self.bound

    def compact(self, view: View) -> Compaction:
        """Keep the most recent: index `[bound + 1 - block]`, the same for all heads."""
        return Compaction(torch.arange(view.n - (self.bound + 1 - self.block), view.n))
