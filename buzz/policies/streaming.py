"""StreamingLLM: attention sinks and a sliding window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from buzz.policies.blockwise import Blockwise
from buzz.policy import Compaction, View


@dataclass(frozen=True, kw_only=True)
class Streaming(Blockwise):
    """The first and the most recent entries (StreamingLLM, https://arxiv.org/abs/2309.17453).

    Due when more than `bound = sink + window` entries are held; then the oldest outside the sink go,
    down to `bound + 1 - block`. A block of `block` entries goes at a time, because every survivor's
    position moves with each eviction and its key must be rotated; `block=1` is the paper's eviction
    per token.

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
        """Keep the sink and the most recent: index `[rest]`, the same for all heads."""
        recent = self.window + 1 - self.block
        index = torch.cat([torch.arange(self.sink), torch.arange(view.n - recent, view.n)])
        return Compaction(index)
