"""The forward pass over a ragged batch: pack the rows, run the model once, unpack the logits."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
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
        """Whether it can share a kernel with its neighbours."""
        return len(self.tokens) == 1


class Runner:
    """Runs the model over sessions' caches."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    @torch.inference_mode()
    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """Append the pieces' tokens to their caches.

        Returns:
            The logits behind the last token of each piece that asks for them, `[rows, vocab]`, in order.
        """
        order = sorted(range(len(pieces)), key=lambda i: _neighbourhood(pieces[i]))
        packed = [pieces[i] for i in order]
        starts = list(itertools.accumulate((len(piece.tokens) for piece in packed), initial=0))
        tokens = [token for piece in packed for token in piece.tokens]
        positions = [at for piece in packed for at in piece.cache.next_positions(len(piece.tokens))]
        asked = {i: starts[at + 1] - 1 for at, i in enumerate(order) if pieces[i].logits}
        last = [asked[i] for i in sorted(asked)]
        for piece in packed:
            piece.cache.prepare(len(piece.tokens))
        ids, places, keep = map(self._tensor, (tokens, positions, last))
        logits = self._backend.forward(ids, places, keep, self._batch(packed, starts))
        for piece in packed:
            piece.cache.append(len(piece.tokens))
        return logits

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
        for run in _runs(decoding):
            first, rows = run[0], slice(row, row + len(run))
            batch.decodes.append(
                DecodeRun(
                    rows,
                    self._neighbours(run),
                    entries[rows],
                    seen[rows],
                    max(piece.cache.n for piece in run) + 1,
                    first.cache.states,
                    first.cache.policy.log_n,
                    first.place,
                )
            )
            row = rows.stop
        return batch

    def _neighbours(self, run: Sequence[Piece]) -> Buffers:
        """The tensors of neighbouring slots, with a leading dimension of slots, as they are used now."""
        first = run[0].place.index
        cache = run[0].cache
        buffers = run[0].place.slots.buffers(slice(first, first + len(run)), cache.states)
        counts = [piece.cache.packed for piece in run]
        if buffers.packed is None or not any(counts):
            return buffers
        packed = buffers.packed.using(self._tensor(counts), max(counts), cache.rotary, cache.rotated_in_cache)
        return replace(buffers, packed=packed)

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._backend.device)


def _neighbourhood(piece: Piece) -> tuple[bool, int, int, str, bool, int]:
    """Sorts decoding pieces first, and such as can share a kernel behind each other."""
    cache = piece.cache
    kind = (cache.policy.log_n or 0, _words(cache.states), cache.rotated_in_cache)
    return (not piece.decodes, id(piece.place.slots), *kind, piece.place.index)


@functools.lru_cache
def _words(states: tuple[State, ...]) -> str:
    """What can be sorted, unlike states themselves."""
    return repr(states)


def _runs(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Cut sorted pieces where slots are not neighbours or need another kernel."""
    runs: list[list[Piece]] = []
    expected: list[object] = []
    for piece in pieces:
        *kind, index = _neighbourhood(piece)
        if runs and [*kind, index] == expected:
            runs[-1].append(piece)
        else:
            runs.append([piece])
        expected = [*kind, index + 1]
    return runs
