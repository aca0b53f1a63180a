"""One forward pass over caches that are fed together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from apiary_server.model.attention import Batch, ChunkRun, DecodeRun
from apiary_server.model.loader import LoadedModel
from buzz import Buffers, Cache, State


class Pass:
    """One forward pass in the making: packed rows and where they belong."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._batch = Batch()
        self._tokens: list[int] = []
        self._positions: list[int] = []

    @property
    def rows(self) -> int:
        """How many so far."""
        return len(self._tokens)

    def chunk(
        self,
        memory: Buffers,
        cache: Cache,
        tokens: Sequence[int],
        states: Sequence[State],
        ahead: int = 0,
    ) -> int:
        """Add tokens behind a cache's entries and `ahead` more; returns their first row."""
        rows = self._add(tokens, cache.next_positions(ahead + len(tokens))[ahead:])
        n, seen, log_n = cache.n + ahead, cache.seen + ahead, cache.policy.log_n
        self._batch.chunks.append(ChunkRun(rows, memory, n, seen, tuple(states), log_n))
        return int(rows.start)

    def decode(
        self,
        memory: Buffers,
        caches: Sequence[Cache],
        tokens: Sequence[int],
        ahead: int,
        states: Sequence[State],
    ) -> int:
        """Add one token for each of neighbouring caches; returns the first row."""
        rows = self._add(tokens, [cache.next_positions(ahead + 1)[-1] for cache in caches])
        entries = [cache.n + ahead for cache in caches]
        seen = self._tensor([cache.seen + ahead for cache in caches])
        run = DecodeRun(
            rows,
            memory,
            self._tensor(entries),
            seen,
            max(entries) + 1,
            tuple(states),
            caches[0].policy.log_n,
        )
        self._batch.decodes.append(run)
        return int(rows.start)

    @torch.inference_mode()
    def run(self, keep: Sequence[int]) -> Tensor:
        """The logits of some rows, float32 `[len(keep), vocab]`."""
        if not self._tokens:
            return torch.empty(0, self._loaded.tokenizer.vocab_size)
        tokens, positions, rows = map(self._tensor, (self._tokens, self._positions, keep))
        return self._loaded.backend.forward(tokens, positions, rows, self._batch).float()

    def _add(self, tokens: Sequence[int], positions: Sequence[int]) -> slice:
        start = self.rows
        self._tokens += tokens
        self._positions += positions
        return slice(start, self.rows)

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=self._loaded.backend.device)
