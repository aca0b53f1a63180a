"""What policies that evict in blocks have in common."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass
from typing import Self

from buzz.policy import Policy, PolicyError

_BLOCK = 32


@dataclass(frozen=True, kw_only=True)
class Blockwise(Policy):
    """A policy that makes room for `block` entries at a time: due at more than `bound`, it leaves `rest`.

    Evicting moves every entry behind the first gap, and their keys must be rotated; one entry at a time, as
    papers have it (`block=1`), would do so at every token.

    Attributes:
        block: entries evicted at a time while decoding, from 1 to `evictable`; by default 32, or `evictable`
            if that is less.

    Raises:
        PolicyError: the bound or the block is out of range.
    """

    block: int = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block == -1:
            object.__setattr__(self, "block", max(1, min(_BLOCK, self.evictable)))
        self._check_bound()
        if not 1 <= self.block <= self.evictable:
            raise PolicyError(
                f"{self.name}: block={self.block} is not between 1 and {self.evictable}, as many as may go"
            )

    @property
    @abstractmethod
    def evictable(self) -> int:
        """Of `bound + 1` entries, how many may go at a time."""

    @property
    def rest(self) -> int:
        """Entries that a compaction leaves."""
        return self.bound + 1 - self.block

    def due(self, n: int, sampled: int) -> bool:
        return n > self.bound

    def sized(self, bound: int) -> Self:
        other = Policy.sized(dataclasses.replace(self, block=1), bound)
        return dataclasses.replace(other, block=max(1, min(self.block, other.evictable)))
