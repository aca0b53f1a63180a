"""The attention function behind transformers' `AttentionInterface`: writes each token's key and value into
its session's cache and attends there. It serves every decoder that uses the interface, without patching
it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from apiary_server.sessions.pool import Lease
from buzz import Buffers, Record, State, attend_chunk, attend_decode

NAME = "apiary"


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


Decode = Callable[[int, Tensor, Tensor, Tensor, float, DecodeRun], Tensor]
"""As `decode`."""


@dataclass(frozen=True, slots=True)
class ChunkRun:
    """Several new tokens of one session, whose cache holds `entries` of `seen` tokens before this step."""

    rows: slice
    cache: Buffers
    entries: int
    seen: int
    states: tuple[State, ...]
    log_n: int | None


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


def attend(
    layer: int,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    batch: Batch,
    decode: Decode = decode,
) -> Tensor:
    """Write packed rows' keys and values into their sessions' caches, and attend there.

    Args:
        layer: which of the caches'.
        queries: `[T, query_heads, head_dim]`, rotated.
        keys: `[T, kv_heads, head_dim]`, rotated.
        values: `[T, kv_heads, head_dim]`.
        scale: of the logits.
        batch: where the rows belong.
        decode: how rows that are alone in their sessions do it.

    Returns:
        `[T, query_heads, head_dim]`, contiguous.
    """
    output = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
    for run in batch.decodes:
        rows = run.rows
        output[rows] = decode(layer, queries[rows], keys[rows], values[rows], scale, run)
    for chunk in batch.chunks:
        rows, end = chunk.rows, chunk.entries + chunk.rows.stop - chunk.rows.start
        new = (part[rows].transpose(0, 1) for part in (keys, values))
        cache_keys, cache_values = chunk.cache.extend(layer, chunk.entries, *new)
        output[rows] = attend_chunk(
            queries[rows].transpose(0, 1),
            cache_keys,
            cache_values,
            scale,
            [Record(s, chunk.cache.state[s.name][layer, :, :end]) for s in chunk.states],
            chunk.seen,
            chunk.log_n,
        ).transpose(0, 1)
    return output


def cached_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    apiary_batch: Batch,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers' own modules call.

    Args:
        module: the attention layer; its `layer_idx` says which layer of the caches.
        query: `[1, query_heads, rows, head_dim]`, rotated.
        key: `[1, kv_heads, rows, head_dim]`, rotated.
        value: `[1, kv_heads, rows, head_dim]`.
        attention_mask: none; which rows see what is in `apiary_batch`.
        scaling: of the logits; default `head_dim ** -0.5`.
        apiary_batch: where the rows belong.

    Returns:
        `[1, rows, query_heads, head_dim]` and no weights.
    """
    layer = module.layer_idx
    if not isinstance(layer, int):
        raise TypeError("attention layers must be numbered")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    queries, keys, values = (part[0].transpose(0, 1) for part in (query, key, value))
    return attend(layer, queries, keys, values, scale, apiary_batch)[None], None


AttentionInterface.register(NAME, cached_attention)
