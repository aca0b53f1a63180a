"""The forward pass over a ragged batch: pack the rows, run the model once, unpack the logits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from apiary_server.model.attention import Batch, ChunkRun, DecodeRun
from apiary_server.sessions.pool import Lease
from buzz import Buffers, Cache


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
    """Runs the model over sessions' caches.

    Args:
        model: a decoder whose attention implementation is `attention.NAME`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._device = model.device

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
        logits: Tensor = self._model(
            input_ids=self._tensor(tokens)[None],
            position_ids=self._tensor(positions)[None],
            use_cache=False,
            logits_to_keep=self._tensor(last),
            apiary_batch=self._batch(packed, starts),
        ).logits
        for piece in packed:
            piece.cache.append(len(piece.tokens))
        return logits[0]

    def _batch(self, packed: Sequence[Piece], starts: Sequence[int]) -> Batch:
        batch = Batch()
        for piece, start in zip(packed, starts, strict=False):
            rows = slice(start, start + len(piece.tokens))
            if not piece.decodes:
                cache = piece.cache
                batch.chunks.append(
                    ChunkRun(
                        rows, cache.buffers, cache.n, cache.seen, cache.policy.states, cache.policy.log_n
                    )
                )
        decoding = [piece for piece in packed if piece.decodes]  # they are the first rows
        row = 0
        for run in _runs(decoding):
            first = run[0]
            entries = [piece.cache.n for piece in run]
            batch.decodes.append(
                DecodeRun(
                    slice(row, row + len(run)),
                    _neighbours(first, len(run)),
                    self._tensor(entries),
                    self._tensor([piece.cache.seen for piece in run]),
                    max(entries) + 1,
                    first.cache.policy.states,
                    first.cache.policy.log_n,
                )
            )
            row += len(run)
        return batch

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


def _neighbourhood(piece: Piece) -> tuple[bool, int, int, str, int]:
    """Sorts decoding pieces first, and such as can share a kernel behind each other."""
    policy = piece.cache.policy
    states = repr(policy.states)
    return (not piece.decodes, id(piece.place.slots), policy.log_n or 0, states, piece.place.index)


def _runs(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Cut sorted pieces where slots are not neighbours or need another kernel."""
    runs: list[list[Piece]] = []
    for piece in pieces:
        if runs:
            *kind, index = _neighbourhood(runs[-1][-1])
            if [*kind, index + 1] == list(_neighbourhood(piece)):
                runs[-1].append(piece)
                continue
        runs.append([piece])
    return runs


def _neighbours(first: Piece, count: int) -> Buffers:
    """The tensors of `count` slots from `first` on, with a leading dimension of slots."""
    here = slice(first.place.index, first.place.index + count)
    return first.place.slots.buffers(here, first.cache.policy.states)
