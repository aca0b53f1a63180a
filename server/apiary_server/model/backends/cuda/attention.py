"""Decode attention over slots of a class wherever they lie, without a look at any value: so that it can be
captured in a CUDA graph."""

from __future__ import annotations

import torch
from torch import Tensor

from apiary_server.model.attention import DecodeRun
from apiary_server.model.operations import Operations
from buzz import Record, attend_decode

_GATHERED = 2**25  # elements of keys at a time: what they take lies outside the cache budget


class ByIndex(Operations):
    """Torch's operations, with decoding over a class of slots, all of which are in `DecodeRun.cache`.

    Each row's entries are copied out of its slot, and its states there and back. Rows that are equal are
    harmless: they write the same to the same place.

    Args:
        slots: int64 `[B]`: in which slot of the class each row's entries lie.
        entries: int64 `[B]`: of each row before this step.
        longest: how many entries are read of each row; at least the most that one has after this step.
    """

    def __init__(self, slots: Tensor, entries: Tensor, longest: int) -> None:
        self._slots = slots
        place = torch.arange(longest, device=slots.device)
        # beyond a row's length there may be NaN, so its first entry is read there
        self._places = place.where(place <= entries[:, None], 0)

    def decode(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float, run: DecodeRun
    ) -> Tensor:
        """As `Operations.decode`."""
        cache, output = run.cache, torch.empty_like(queries)
        cache.write((self._slots, layer, slice(None), run.entries), keys, values)
        states = [cache.state[state.name][:, layer, :, : run.most] for state in run.states]
        records = [
            Record(state, memory[self._slots]) for state, memory in zip(run.states, states, strict=True)
        ]
        kv_heads, head_dim = keys.shape[1:]
        heads = torch.arange(kv_heads, device=keys.device)[:, None]
        most = max(1, _GATHERED // (kv_heads * head_dim * run.most))
        for start in range(0, len(queries), most):
            rows = slice(start, start + most)
            slots, places = self._slots[rows, None, None], self._places[rows, None]
            output[rows] = attend_decode(
                queries[rows],
                *cache.dense_at((slots, layer, heads, places), cache.dtype),
                run.entries[rows] + 1,
                scale,
                [Record(record.state, record.into[rows]) for record in records],
                run.seen[rows],
                run.log_n,
                finite=True,
            )
        for record, memory in zip(records, states, strict=True):
            memory[self._slots] = record.into
        return output
