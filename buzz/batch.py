"""A batch of sessions in one memory, advanced together, layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from buzz.attention import Record, attend_chunk, attend_decode
from buzz.buffers import Buffers
from buzz.cache import Cache
from buzz.policy import Policy
from buzz.quant import BLOCK
from buzz.rotary import Rotary


class _Sizes(NamedTuple):
    """Entries of a session that memory has room for: all, those quantised, those not."""

    capacity: int
    packed: int
    dense: int


class Batch:
    """The caches of B sessions of one policy, in memory of its own that grows with them.

    At rest that is room for at most `bound + 1` entries a session. A segment that does not fit there runs in
    a workspace with room for the entries held and the new tokens, which is freed when it ends. There, too,
    what is quantised stays so, and nothing else is quantised ahead: when that happens depends on a session's
    own counts, and not on the others of its batch.

    Args:
        policy: the rule; resolved.
        rotary: the model's rotary embedding.
        layers: of the model.
        like: keys `[B, kv_heads, any, head_dim]`, whose shape, dtype and device the entries have.

    Attributes:
        caches: one for each session.
        memory: of all sessions, with a leading dimension of B.
    """

    def __init__(self, policy: Policy, rotary: Rotary, layers: int, like: Tensor) -> None:
        self.policy, self.rotary, self.layers = policy, rotary, layers
        self._like = like.new_empty(*like.shape[:2], 0, like.shape[3])
        self.memory = self._empty(len(like), self._at_rest(0))
        self.caches = [Cache(policy, rotary, self.memory.of_sessions(row)) for row in range(len(like))]

    @property
    def nbytes(self) -> int:
        """Bytes of the memory as it is now."""
        return self.memory.nbytes

    @property
    def live(self) -> Buffers:
        """The memory as it is used now, to read and extend by a token in each session."""
        packed = self.memory.packed
        if packed is None:
            return self.memory
        device, caches = self._like.device, self.caches
        counts = torch.tensor([cache.packed for cache in caches], device=device)
        changed = [cache.rotated_in_cache for cache in caches]
        in_cache = all(changed) if len(set(changed)) == 1 else torch.tensor(changed, device=device)
        most = max(cache.packed for cache in caches)
        using = packed.using(counts, most, self.rotary, in_cache)
        return replace(self.memory, packed=using)

    def begin(self, real: Tensor, given: Tensor) -> Step | Prompt:
        """Open a segment in each session that has tokens, and make room for them.

        Args:
            real: bool `[B, T]`: which of the T columns are tokens, and not padding.
            given: integer `[B, T]`: the positions to which queries and keys will come rotated.

        Raises:
            ValueError: the tokens would get positions that the model was not trained for.
        """
        counts = real.sum(dim=1).tolist()
        self._reserve(counts)
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
        twin.memory = self._empty(len(indices), self._at_rest(self.memory.capacity))
        twin.caches = []
        for row, index in enumerate(indices):
            source, copied = self.caches[index], Cache(self.policy, self.rotary, twin.memory.of_sessions(row))
            copied.restore(source.state())
            copied.buffers.copy_from(source.buffers, source.n, source.packed)
            twin.caches.append(copied)
        return twin

    def _reserve(self, counts: Sequence[int]) -> None:
        """Make room for so many more tokens of each session."""
        after = [(cache.n + count, cache.packed) for cache, count in zip(self.caches, counts, strict=True)]
        if all(self.memory.fits(*entries) for entries in after):
            return
        capacity, need = self.memory.capacity, max(n for n, _ in after)
        dense = max(n - packed for n, packed in after)
        sizes = self._at_rest(max(need, capacity + capacity // 4 + 64))
        if need > sizes.capacity or dense > sizes.dense:  # a workspace
            sizes = _Sizes(need, max(packed for _, packed in after), dense)
        memory = self._empty(len(self.caches), sizes)
        for row, cache in enumerate(self.caches):
            cache.copy_to(memory.of_sessions(row))
        self.memory = memory

    def _end(self, counts: Sequence[int]) -> None:
        """Count the tokens, compact, and leave the workspace."""
        rest = self._at_rest(self.memory.capacity)
        memory = None if _sizes(self.memory) == rest else self._empty(len(self.caches), rest)
        for row, (cache, count) in enumerate(zip(self.caches, counts, strict=True)):
            cache.append(count)
            cache.end_segment(None if memory is None else memory.of_sessions(row))
        self.memory = memory or self.memory

    def _at_rest(self, capacity: int) -> _Sizes:
        """Sizes in which sessions of up to `capacity` entries rest, and grow by a token."""
        policy = self.policy
        capacity = min(capacity, policy.bound + 1)
        if policy.kivi is None:
            return _Sizes(capacity, 0, capacity)
        packed = max(0, min(capacity, policy.bound) - policy.residual)
        return _Sizes(capacity, packed, min(capacity, policy.residual + BLOCK))

    def _empty(self, rows: int, sizes: _Sizes) -> Buffers:
        like, policy, layers = self._like, self.policy, rows * self.layers
        shape = (layers, like.shape[1], sizes.capacity, like.shape[3], like.dtype, like.device)
        with torch.inference_mode(False):  # else a later segment in another mode could not write to it
            memory = Buffers.empty(*shape, policy.states, policy.kivi, sizes.packed, sizes.dense)
        return memory.split(self.layers)


def _sizes(memory: Buffers) -> _Sizes:
    return _Sizes(memory.capacity, 0 if memory.packed is None else memory.packed.capacity, memory.dense)


class Step:
    """One token of every session."""

    def __init__(self, batch: Batch, given: Tensor) -> None:
        self._batch = batch
        device, caches = given.device, batch.caches
        entries = [cache.n for cache in caches]
        wanted = torch.tensor([cache.next_positions(1).start for cache in caches], device=device)
        self._delta = _difference(wanted.view(-1, 1, 1), given[:, None])
        self._live = batch.live
        self._most = max(entries) + 1
        self._entries = torch.tensor(entries, device=device)
        self._seen = torch.tensor([cache.seen for cache in caches], device=device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of a layer: queries `[B, query_heads, T, head_dim]`, keys and values
        `[B, kv_heads, T, head_dim]` to `[B, T, query_heads, head_dim]`."""
        batch, most = self._batch, self._most
        query, key = _move(batch.rotary, query, key, self._delta)
        keys, values = self._live.extend_each(layer, self._entries, most, key[:, :, 0], value[:, :, 0])
        states = [(state, self._live.state[state.name]) for state in batch.policy.states]
        output = attend_decode(
            query[:, :, 0],
            keys,
            values,
            self._entries + 1,
            scale,
            [Record(state, into[:, layer, :, :most]) for state, into in states],
            self._seen,
            batch.policy.log_n,
        )
        return output[:, None]

    def end(self) -> None:
        """Close the segments, after the last layer."""
        self._batch._end([1] * len(self._batch.caches))


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One session's tokens: which columns they are, where they go, and by what to move them."""

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
                cache = batch.caches[row]
                span = cache.next_positions(count)
                wanted = torch.arange(span.start, span.stop, device=given.device)
                delta = _difference(wanted, given[row, columns])
                self._chunks.append(_Chunk(row, count, columns, delta))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """As `Step.attend`; zeros where there is padding."""
        output = torch.zeros_like(query.transpose(1, 2))
        for chunk in self._chunks:
            row, columns, cache = chunk.row, chunk.columns, self._batch.caches[chunk.row]
            queries, keys = query[row][:, columns], key[row][:, columns]
            queries, keys = _move(self._batch.rotary, queries, keys, chunk.delta)
            output[row, columns] = attend_chunk(
                queries,
                *cache.extend(layer, keys, value[row][:, columns]),
                scale,
                cache.records(layer, cache.n + chunk.count),
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
