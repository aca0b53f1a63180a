"""Where the rows of a step belong, and attention there: each token's key and value are written into its
session's cache first."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from apiary_server.sessions.pool import SlotClass
from buzz import Buffers, Record, State, attend_chunk, attend_decode


@dataclass(frozen=True, eq=False)
class DecodeRun:
    """One new token for each of B slots of a class, wherever they lie in it.

    Attributes:
        rows: of the step.
        cache: with a leading dimension of slots; what is packed there is counted by row.
        entries: int64 `[B]`, of each slot before this step.
        seen: int64 `[B]`, each session's tokens before this step.
        most: the largest count of entries after it.
        states: what is recorded.
        log_n: as in `Policy`.
        slots: which of the cache's each row has; None: as many as rows, in their order.
        home: the class of which `cache` is the whole; None: the caches lie in memory of their own.
    """

    rows: slice
    cache: Buffers
    entries: Tensor
    seen: Tensor
    most: int
    states: tuple[State, ...]
    log_n: int | None
    slots: Sequence[int] | None = None
    home: SlotClass | None = None

    @functools.cached_property
    def neighbours(self) -> Sequence[DecodeRun]:
        """The run in parts whose slots lie behind each other, so that their tensors are strided views; `rows`
        are those of the run."""
        slots = range(len(self.entries)) if self.slots is None else self.slots
        ends = [row for row in range(1, len(slots)) if slots[row] != slots[row - 1] + 1]
        return [self._part(slice(*ends), slots) for ends in itertools.pairwise([0, *ends, len(slots)])]

    def _part(self, rows: slice, slots: Sequence[int]) -> DecodeRun:
        first, used = slots[rows.start], self.cache.packed
        cache = self.cache.of_sessions(slice(first, first + rows.stop - rows.start))
        if used is not None and used.most and cache.packed is not None:
            count = torch.as_tensor(used.count)[rows]
            in_cache = used.in_cache[rows] if isinstance(used.in_cache, Tensor) else used.in_cache
            cache = replace(cache, packed=cache.packed.using(count, used.most, used.rotary, in_cache))
        entries, seen = self.entries[rows], self.seen[rows]
        return replace(self, rows=rows, cache=cache, slots=None, home=None, entries=entries, seen=seen)

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
    """Where the rows of a packed forward pass belong.

    Attributes:
        decodes: sessions that share a kernel, one row each.
        chunks: sessions with several rows.
        meanwhile: what else the host has to do: a backend calls it when the long work begins that needs no
            more of Python, so that other threads have that.
    """

    decodes: list[DecodeRun] = field(default_factory=list)
    chunks: list[ChunkRun] = field(default_factory=list)
    meanwhile: Callable[[], object] = lambda: None


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
    parts = []
    for part in run.neighbours:
        rows, lengths, records = part.rows, part.entries + 1, part.records(layer)
        entries = part.cache.extend_each(layer, part.entries, part.most, keys[rows], values[rows])
        parts.append(attend_decode(queries[rows], *entries, lengths, scale, records, part.seen, part.log_n))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


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
