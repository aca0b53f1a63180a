"""What policies that evict in blocks have in common."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass
from typing import Self

from buzz.policy import Policy, PolicyError
from buzz.regions import Kind, Region, in_order

_BLOCK = 32


@dataclass(frozen=True, kw_only=True)
class Blockwise(Policy):
    """A policy that makes room for `block` entries at a time: due at more than `bound`, it leaves `rest`.

    Evicting moves every entry behind the first gap, and their keys must be rotated; one entry at a time, as
    papers have it (`block=1`), would do so at every token.

    Attributes:
        block: entries evicted at a time while decoding, from 1 to `evictable`. None, the default, means 32,
            or `evictable` if that is less.

    Raises:
        PolicyError: nothing could be evicted, or not as many as the block.
    """

    block: int | None = None

    def validate(self) -> None:
        if self.evictable < 1:
            raise PolicyError(
                f"{self.name}: a bound of {self.bound} leaves none to evict, since all must stay; make "
                "smaller what is always kept, or the bound larger"
            )
        if self.block is not None and not 1 <= self.block <= self.evictable:
            raise PolicyError(
                f"{self.name}: block={self.block} is not between 1 and {self.evictable}, as many as may go"
            )

    @property
    @abstractmethod
    def evictable(self) -> int:
        """Of `bound + 1` entries, how many may go at a time."""

    @property
    def rest(self) -> int:
        """Entries that a compaction leaves: a block fewer than it finds while decoding."""
        block = min(_BLOCK, self.evictable) if self.block is None else self.block
        return self.bound + 1 - block

    def due(self, n: int, sampled: int) -> bool:
        return n > self.bound

    def _around(self, chosen: Kind, n: int, seen: int, *, sink: int = 0, recent: int) -> tuple[Region, ...]:
        """Sinks, what the last compaction chose, what has come since, and the most recent.

        A compaction leaves `rest` entries, the `recent` last of which it did not choose.
        """
        end = self.rest - recent if seen > n else 0
        return in_order(n, (Kind.SINK, sink), (chosen, end), (Kind.MIDDLE, n - recent), (Kind.WINDOW, n))

    def sized(self, bound: int) -> Self:
        other = Policy.sized(dataclasses.replace(self, block=None), bound)
        return dataclasses.replace(other, block=self.block and min(self.block, other.evictable))
