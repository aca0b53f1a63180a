"""The forward pass over a ragged batch: pack the rows, run the model once, unpack the logits."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from apiary_server.model.attention import Batch, ChunkRun, DecodeRun
from apiary_server.model.backends.base import Backend
from apiary_server.sessions.pool import Lease
from buzz import Buffers, Cache, State


@dataclass(frozen=True, slots=True)
class Piece:
    """One session's share of a forward pass: new tokens for a cache that lies in `place`."""

    tokens: Sequence[int]
    cache: Cache
    place: Lease
    logits: bool

    @property
    def decodes(self) -> bool:
        """Whether it can share a kernel with others."""
        return len(self.tokens) == 1


class Runner:
    """Runs the model over sessions' caches."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    @torch.inference_mode()
    def run(self, pieces: Sequence[Piece], meanwhile: Callable[[], object] = lambda: None) -> Tensor:
        """Append the pieces' tokens to their caches.

        Args:
            pieces: of the sessions.
            meanwhile: as in `Batch`.

        Returns:
            The logits behind the last token of each piece that asks for them, `[rows, vocab]`, in order.
        """
        order = sorted(range(len(pieces)), key=lambda i: (*_kind(pieces[i]), pieces[i].place.index))
        packed = [pieces[i] for i in order]
        starts = list(itertools.accumulate((len(piece.tokens) for piece in packed), initial=0))
        tokens = [token for piece in packed for token in piece.tokens]
        positions = [at for piece in packed for at in piece.cache.next_positions(len(piece.tokens))]
        asked = {i: starts[at + 1] - 1 for at, i in enumerate(order) if pieces[i].logits}
        last = [asked[i] for i in sorted(asked)]
        batch = self._batch(packed, starts)
        batch.meanwhile = meanwhile
        self._prepare(packed, batch)
        ids, places, keep = map(self._tensor, (tokens, positions, last))
        logits = self._backend.forward(ids, places, keep, batch)
        for piece in packed:
            piece.cache.append(len(piece.tokens))
        return logits

    def _prepare(self, packed: Sequence[Piece], batch: Batch) -> None:
        """As `Cache.prepare`, for all sessions that decode in a run at once."""
        for piece in packed:
            if piece.decodes:
                piece.cache.require(1)
            else:
                piece.cache.prepare(len(piece.tokens))
        slots = self._tensor([piece.place.index for piece in packed if piece.decodes])
        for run in batch.decodes:
            run.cache.begin_each(slots[run.rows], run.entries, run.seen, run.states)

    def _batch(self, packed: Sequence[Piece], starts: Sequence[int]) -> Batch:
        batch = Batch()
        for piece, start in zip(packed, starts, strict=False):
            rows = slice(start, start + len(piece.tokens))
            if not piece.decodes:
                cache = piece.cache
                batch.chunks.append(
                    ChunkRun(rows, cache.live, cache.n, cache.seen, cache.states, cache.policy.log_n)
                )
        decoding = [piece for piece in packed if piece.decodes]  # they are the first rows
        entries = self._tensor([piece.cache.n for piece in decoding])
        seen = self._tensor([piece.cache.seen for piece in decoding])
        row = 0
        for _, alike in itertools.groupby(decoding, _kind):
            run = list(alike)
            cache, rows = run[0].cache, slice(row, row + len(run))
            batch.decodes.append(
                DecodeRun(
                    rows,
                    self._memory(run),
                    entries[rows],
                    seen[rows],
                    max(piece.cache.n for piece in run) + 1,
                    cache.states,
                    cache.policy.log_n,
                    [piece.place.index for piece in run],
                    run[0].place.slots,
                )
            )
            row = rows.stop
        return batch

    def _memory(self, run: Sequence[Piece]) -> Buffers:
        """The tensors of all slots of a class, with a leading dimension of slots, as they are used now."""
        cache = run[0].cache
        buffers = run[0].place.slots.buffers(slice(None), cache.states)
        counts = [piece.cache.packed for piece in run]
        if buffers.packed is None or not any(counts):
            return buffers
        packed = buffers.packed.using(self._tensor(counts), max(counts), cache.rotary, cache.rotated_in_cache)
        return replace(buffers, packed=packed)

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._backend.device)


def _kind(piece: Piece) -> tuple[bool, int, int, str, int]:
    """Equal for pieces that decode and can share a kernel; those that decode are the least."""
    cache = piece.cache
    unpacked = 1 + cache.rotated_in_cache if cache.packed else 0
    return (not piece.decodes, id(piece.place.slots), cache.policy.log_n or 0, _words(cache.states), unpacked)


@functools.lru_cache
def _words(states: tuple[State, ...]) -> str:
    """What can be sorted, unlike states themselves."""
    return repr(states)
