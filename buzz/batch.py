"""A batch of sessions in one memory, advanced together, layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from buzz.attention import Record, attend_chunk, attend_decode
from buzz.buffers import Buffers
from buzz.cache import Cache
from buzz.policy import Policy
from buzz.rotary import Rotary


class Batch:
    """The caches of B sessions of one policy, in memory of its own that grows with them.

    At rest that is room for at most `bound + 1` entries a session. A segment that does not fit there runs in
    a workspace with room for the entries held and the new tokens, which is freed when it ends.

    Args:
        policy: the rule; resolved.
        rotary: the model's rotary embedding.
        layers: of the model.
        like: keys `[B, kv_heads, any, head_dim]`, whose shape, dtype and device the entries have.

    Attributes:
        caches: one for each session.
        memory: layer l of session b is its layer `b * layers + l`.
    """

    def __init__(self, policy: Policy, rotary: Rotary, layers: int, like: Tensor) -> None:
        self.policy, self.rotary, self.layers = policy, rotary, layers
        self._like = like.new_empty(*like.shape[:2], 0, like.shape[3])
        self.memory = self._empty(len(like), 0)
        self.caches = [Cache(policy, rotary, self._of(self.memory, row)) for row in range(len(like))]

    @property
    def nbytes(self) -> int:
        """Bytes of the memory as it is now."""
        memory = self.memory
        tensors = (memory.keys, memory.values, memory.position, *memory.state.values())
        return sum(tensor.nbytes for tensor in tensors)

    def begin(self, real: Tensor, given: Tensor) -> Step | Prompt:
        """Open a segment in each session that has tokens, and make room for them.

        Args:
            real: bool `[B, T]`: which of the T columns are tokens, and not padding.
            given: integer `[B, T]`: the positions to which queries and keys will come rotated.

        Raises:
            ValueError: the tokens would get positions that the model was not trained for.
        """
        counts = real.sum(dim=1).tolist()
        self._reserve(max(cache.n + count for cache, count in zip(self.caches, counts, strict=True)))
        for cache, count in zip(self.caches, counts, strict=True):
            if count:
                cache.begin_segment(count)
                cache.prepare(count)
        if real.shape[1] == 1 and all(counts):
            return Step(self, given)
        return Prompt(self, real, given, counts)

    def select(self, indices: Sequence[int]) -> Self:
        """A batch of copies of these sessions."""
        twin = copy.copy(self)
        twin.memory = self._empty(len(indices), self.memory.capacity)
        twin.caches = []
        for row, index in enumerate(indices):
            source, copied = self.caches[index], Cache(self.policy, self.rotary, self._of(twin.memory, row))
            copied.restore(source.state())
            copied.buffers.copy_from(source.buffers, source.n)
            twin.caches.append(copied)
        return twin

    def _reserve(self, need: int) -> None:
        capacity, rest = self.memory.capacity, self.policy.bound + 1
        if need > capacity:
            roomy = max(need, capacity + capacity // 4 + 64)
            memory = self._empty(len(self.caches), need if need > rest else min(rest, roomy))
            for row, cache in enumerate(self.caches):
                cache.copy_to(self._of(memory, row))
            self.memory = memory

    def _end(self, counts: Sequence[int]) -> None:
        """Count the tokens, compact, and leave the workspace."""
        rest = self.policy.bound + 1
        memory = self._empty(len(self.caches), rest) if self.memory.capacity > rest else None
        for row, (cache, count) in enumerate(zip(self.caches, counts, strict=True)):
            cache.append(count)
            cache.end_segment(None if memory is None else self._of(memory, row))
        self.memory = memory or self.memory

    def _empty(self, rows: int, capacity: int) -> Buffers:
        like, layers = self._like, rows * self.layers
        kv_heads, head_dim = like.shape[1], like.shape[3]
        with torch.inference_mode(False):  # else a later segment in another mode could not write to it
            return Buffers.empty(
                layers, kv_heads, capacity, head_dim, like.dtype, like.device, self.policy.states
            )

    def _of(self, memory: Buffers, row: int) -> Buffers:
        layers = slice(row * self.layers, (row + 1) * self.layers)
        state = {name: tensor[layers] for name, tensor in memory.state.items()}
        return Buffers(memory.keys[layers], memory.values[layers], memory.position[layers], state)


class Step:
    """One token of every session."""

    def __init__(self, batch: Batch, given: Tensor) -> None:
        self._batch = batch
        device, caches = given.device, batch.caches
        entries = [cache.n for cache in caches]
        wanted = torch.tensor([cache.next_positions(1).start for cache in caches], device=device)
        self._delta = _difference(wanted.view(-1, 1, 1), given[:, None])
        self._most = max(entries) + 1
        self._rows = torch.arange(len(caches), device=device)
        self._entries = torch.tensor(entries, device=device)
        self._seen = torch.tensor([cache.seen for cache in caches], device=device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of a layer: queries `[B, query_heads, T, head_dim]`, keys and values
        `[B, kv_heads, T, head_dim]` to `[B, T, query_heads, head_dim]`."""
        batch, most = self._batch, self._most
        memory, policy, layers = batch.memory, batch.policy, slice(layer, None, batch.layers)
        query, key = _move(batch.rotary, query, key, self._delta)
        keys, values = memory.keys[layers], memory.values[layers]
        keys[self._rows, :, self._entries] = key[:, :, 0]
        values[self._rows, :, self._entries] = value[:, :, 0]
        output = attend_decode(
            query[:, :, 0],
            keys[:, :, :most],
            values[:, :, :most],
            self._entries + 1,
            scale,
            [Record(state, memory.state[state.name][layers, :, :most]) for state in policy.states],
            self._seen,
            policy.log_n,
        )
        return output[:, None]

    def end(self) -> None:
        """Close the segments, after the last layer."""
        self._batch._end([1] * len(self._batch.caches))


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One session's tokens: which columns they are, and by what to move them."""

    row: int
    count: int
    columns: slice | Tensor
    delta: Tensor | None


class Prompt:
    """Any tokens of any sessions."""

    def __init__(self, batch: Batch, real: Tensor, given: Tensor, counts: Sequence[int]) -> None:
        self._batch = batch
        self._counts = counts
        self._chunks = []
        for row, count in enumerate(counts):
            if count:
                columns = slice(None) if count == real.shape[1] else real[row].nonzero().flatten()
                span = batch.caches[row].next_positions(count)
                wanted = torch.arange(span.start, span.stop, device=given.device)
                self._chunks.append(_Chunk(row, count, columns, _difference(wanted, given[row, columns])))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """As `Step.attend`; zeros where there is padding."""
        output = torch.zeros_like(query.transpose(1, 2))
        for chunk in self._chunks:
            row, columns, cache = chunk.row, chunk.columns, self._batch.caches[chunk.row]
            queries, keys = query[row][:, columns], key[row][:, columns]
            queries, keys = _move(self._batch.rotary, queries, keys, chunk.delta)
            buffers, end = cache.buffers, cache.n + chunk.count
            buffers.keys[layer, :, cache.n : end] = keys
            buffers.values[layer, :, cache.n : end] = value[row][:, columns]
            output[row, columns] = attend_chunk(
                queries,
                buffers.keys[layer, :, :end],
                buffers.values[layer, :, :end],
                scale,
                cache.records(layer, end),
                cache.seen,
                cache.policy.log_n,
            ).transpose(0, 1)
        return output

    def end(self) -> None:
        """Close the segments, after the last layer."""
        self._batch._end(self._counts)


def _difference(wanted: Tensor, given: Tensor) -> Tensor | None:
    """None if there is none."""
    delta = wanted - given
    return delta if bool(delta.any()) else None


def _move(rotary: Rotary, query: Tensor, key: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
    if delta is None:
        return query, key
    heads = query.shape[-3]
    moved = rotary.rotate(torch.cat([query, key], dim=-3), delta)
    return moved[..., :heads, :, :], moved[..., heads:, :, :]
