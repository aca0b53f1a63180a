"""StreamingLLM: attention sinks and a sliding window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from buzz.policy import Compaction, Policy, PolicyError, View


@dataclass(frozen=True, kw_only=True)
class Streaming(Policy):
    """The first and the most recent entries (StreamingLLM, https://arxiv.org/abs/2309.17453).

    Due when more than `bound = sink + window` entries are held; then the oldest outside the sink go,
    down to `bound + 1 - block`. A block of `block` entries goes at a time, because every survivor's
    position moves with each eviction and its key must be rotated; `block=1` is the paper's eviction
    per token.

    Attributes:
        sink: first entries, always kept.
        window: most recent entries at the bound.
        block: entries evicted at a time while decoding, from 1 to `window`; by default 32, or `window` if
            that is less.
    """

    sink: int = 4
    window: int = 560
    block: int = -1

    name: ClassVar[str] = "streaming"
    sizes: ClassVar[tuple[str, ...]] = ("window",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block == -1:
            object.__setattr__(self, "block", max(1, min(32, self.window)))
        self._check_bound()
        if not 1 <= self.block <= self.window:
            raise PolicyError(f"streaming: block={self.block} is not between 1 and window={self.window}")

    @property
    def bound(self) -> int:
        return self.sink + self.window

    def due(self, n: int, sampled: int) -> bool:
        return n > self.bound

    def compact(self, view: View) -> Compaction:
        """Keep the sink and the most recent: index `[bound + 1 - block]`, the same for all heads."""
        recent = self.window + 1 - self.block
        index = torch.cat([torch.arange(self.sink), torch.arange(view.n - recent, view.n)])
        return Compaction(index)
