"""What a decoder's layers are made of, in torch operations: for any device and dtype. Backends that can do
one of them faster override it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm

from apiary_server.model.attention import Batch, ChunkRun, DecodeRun, chunk, decode

Linear = Callable[[Tensor], Tensor]
"""Rows `[T, in]` to `[T, out]`."""


@dataclass(frozen=True, slots=True)
class Norm:
    """Root mean square normalisation (https://arxiv.org/abs/1910.07467) of the last dimension."""

    weight: Tensor
    eps: float

    def __call__(self, rows: Tensor) -> Tensor:
        return rms_norm(rows, self.weight.shape, self.weight, self.eps)


class Operations:
    """As torch has them."""

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """A linear layer of a weight `[out, in]` and a bias `[out]`, neither of which needs to be kept."""
        return lambda rows: linear(rows, weight, bias)

    def add_norm(self, norm: Norm, rows: Tensor, more: Tensor | None) -> Tensor:
        """Normalised `rows + more`, `[T, hidden]` each and contiguous; `rows` becomes the sum."""
        return norm(rows if more is None else rows.add_(more))

    def rotate(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Heads `[T, H, head_dim]`, rotated in the Llama convention by `[T, 1, head_dim / 2]`; what was
        passed may be overwritten."""
        first, second = heads.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def gated(self, gate_up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        """The first half of rows `[T, 2 * inner]` activated, times the second: `[T, inner]`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return activation(gate) * up

    def take(self, rows: Tensor, index: Tensor) -> Tensor:
        """Of contiguous rows `[T, size]` those of an index int64 `[R]`."""
        return rows[index]

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float, batch: Batch
    ) -> Tensor:
        """Write packed rows' keys and values into their sessions' caches, and attend there.

        Args:
            layer: which of the caches'.
            queries: `[T, query_heads, head_dim]`, rotated.
            keys: `[T, kv_heads, head_dim]`, rotated.
            values: `[T, kv_heads, head_dim]`.
            scale: of the logits.
            batch: where the rows belong.

        Returns:
            `[T, query_heads, head_dim]`, contiguous.
        """
        if len(batch.decodes) == 1 and not batch.chunks:
            return self.decode(layer, queries, keys, values, scale, batch.decodes[0])
        if len(batch.chunks) == 1 and not batch.decodes:
            return self.chunk(layer, queries, keys, values, scale, batch.chunks[0]).contiguous()
        output = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
        for run in batch.decodes:
            rows = run.rows
            output[rows] = self.decode(layer, queries[rows], keys[rows], values[rows], scale, run)
        for each in batch.chunks:
            rows = each.rows
            output[rows] = self.chunk(layer, queries[rows], keys[rows], values[rows], scale, each)
        return output

    def decode(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float, run: DecodeRun
    ) -> Tensor:
        """As `apiary_server.model.attention.decode`."""
        return decode(layer, queries, keys, values, scale, run)

    def chunk(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float, run: ChunkRun
    ) -> Tensor:
        """As `apiary_server.model.attention.chunk`."""
        return chunk(layer, queries, keys, values, scale, run)
