"""Where the rows of a step belong, and attention there: each token's key and value are written into its
session's cache first."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from apiary_server.sessions.pool import Lease
from buzz import Buffers, Record, State, attend_chunk, attend_decode


@dataclass(frozen=True, slots=True)
class DecodeRun:
    """One new token for each of B neighbouring slots of a class.

    `cache` tensors are strided views with leading dimension B; `entries` and `seen`, int64 `[B]`, count each
    slot's entries and its session's tokens before this step; `most` is the largest count of entries after it.
    `first` leases the first of the slots; None: the caches lie in memory of their own.
    """

    rows: slice
    cache: Buffers
    entries: Tensor
    seen: Tensor
    most: int
    states: tuple[State, ...]
    log_n: int | None
    first: Lease | None = None

    def records(self, layer: int) -> list[Record]:
        """What attention in a layer records, and where."""
        return [Record(s, self.cache.state[s.name][:, layer, :, : self.most]) for s in self.states]


@dataclass(frozen=True, slots=True)
class ChunkRun:
    """Several new tokens of one session, whose cache holds `entries` of `seen` tokens before this step."""

    rows: slice
    cache: Buffers
    entries: int
    seen: int
    states: tuple[State, ...]
    log_n: int | None

    @property
    def total(self) -> int:
        """Entries after this step."""
        return self.entries + len(range(self.rows.start, self.rows.stop))

    def records(self, layer: int) -> list[Record]:
        """What attention in a layer records, and where."""
        return [Record(s, self.cache.state[s.name][layer, :, : self.total]) for s in self.states]


@dataclass(slots=True)
class Batch:
    """Where the rows of a packed forward pass belong."""

    decodes: list[DecodeRun] = field(default_factory=list)
    chunks: list[ChunkRun] = field(default_factory=list)


def decode(layer: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float, run: DecodeRun) -> Tensor:
    """Write one new entry into each of the run's caches, and attend there.

    Args:
        layer: which of the caches'.
        queries: `[B, query_heads, head_dim]`, rotated.
        keys: `[B, kv_heads, head_dim]`, rotated.
        values: `[B, kv_heads, head_dim]`.
        scale: of the logits.
        run: the caches.

    Returns:
        `[B, query_heads, head_dim]`.
    """
    cache_keys, cache_values = run.cache.extend_each(layer, run.entries, run.most, keys, values)
    records = run.records(layer)
    lengths = run.entries + 1
    return attend_decode(queries, cache_keys, cache_values, lengths, scale, records, run.seen, run.log_n)


def chunk(layer: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float, run: ChunkRun) -> Tensor:
    """Write a session's new entries into its cache, and attend there.

    Args:
        layer: which of the cache's.
        queries: `[T, query_heads, head_dim]`, rotated.
        keys: `[T, kv_heads, head_dim]`, rotated.
        values: `[T, kv_heads, head_dim]`.
        scale: of the logits.
        run: the cache.

    Returns:
        `[T, query_heads, head_dim]`.
    """
    new = (part.transpose(0, 1) for part in (keys, values))
    cache_keys, cache_values = run.cache.extend(layer, run.entries, *new)
    records = run.records(layer)
    rows = queries.transpose(0, 1)
    return attend_chunk(rows, cache_keys, cache_values, scale, records, run.seen, run.log_n).transpose(0, 1)
