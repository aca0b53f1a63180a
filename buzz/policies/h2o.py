"""H2O: heavy hitters and recent entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from buzz.policy import Compaction, Policy, PolicyError


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
    scored: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.block == -1:
            object.__setattr__(self, "block", max(1, min(32, self.heavy)))
        super().__post_init__()
        self._check_bound()
        if not 1 <= self.block <= self.heavy:
            raise PolicyError(f"h2o: block={self.block} is not between 1 and heavy={self.heavy}")

    @property
    def bound(self) -> int:
        return self.heavy + self.recent

    def due(self, n: int, sampled: int) -> bool:
        return n > self.bound

    def compact(self, n: int, sampled: int, score: Tensor | None) -> Compaction:
        """Keep heavy hitters and recent: index and score `[..., kv_heads, bound + 1 - block]`."""
        if score is None:
            raise ValueError("h2o compacts by score, and none was given")
        older = n - self.recent
        # topk breaks ties as it likes; a stable sort lets the first win on every device
        ranked = score[..., :older].argsort(dim=-1, descending=True, stable=True)
        heavy = ranked[..., : self.heavy + 1 - self.block].sort(dim=-1).values
        recent = torch.arange(older, n, device=score.device).expand(*score.shape[:-1], -1)
        index = torch.cat([heavy, recent], dim=-1)
        return Compaction(index, score.gather(-1, index), sampled)
