"""A decode step of so many sessions that can be repeated without the host: the same kernels on the same
memory."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from apiary_server.model.attention import Batch, DecodeRun
from apiary_server.model.backends.cuda.attention import ByIndex
from apiary_server.model.backends.cuda.graphs import Capture
from apiary_server.model.decoder import Decoder
from apiary_server.sessions.pool import SlotClass
from buzz import Buffers, State

INPUTS = 5
"""Rows of `decode_step`'s inputs: tokens, positions, slots, and `DecodeRun`'s entries and seen."""


def decode_step(
    decoder: Decoder,
    cache: Buffers,
    states: tuple[State, ...],
    log_n: int | None,
    longest: int,
    inputs: Tensor,
) -> Tensor:
    """One new token for each of B sessions.

    Args:
        decoder: the model.
        cache: all slots of a class, with a leading dimension of slots.
        states: what attention records.
        log_n: as in `DecodeRun`.
        longest: entries that are read of each slot.
        inputs: int64 `[INPUTS, B]`.

    Returns:
        As `Decoder.hidden`, `[B, hidden]`.
    """
    tokens, positions, slots, entries, seen = inputs.unbind()
    # slots are a tensor here, which `ByIndex` has: numbers of the host would be captured
    run = DecodeRun(slice(0, len(tokens)), cache, entries, seen, longest, states, log_n)
    by_index = replace(decoder, operations=ByIndex(slots, entries, longest))
    return by_index.hidden(tokens, positions, Batch(decodes=[run]))


class DecodeStep:
    """`decode_step` for up to `count` sessions, captured: its inputs are copied to where it reads them.

    Args:
        decoder: the model.
        capture: what makes it fast.
        slots: the class in which the caches lie.
        states: what attention records.
        log_n: as in `DecodeRun`.
        count: of sessions; fewer are filled up with copies of the first.
        longest: entries that are read of each.
    """

    def __init__(
        self,
        decoder: Decoder,
        capture: Capture,
        slots: SlotClass,
        states: tuple[State, ...],
        log_n: int | None,
        count: int,
        longest: int,
    ) -> None:
        self.inputs = torch.zeros(INPUTS, count, dtype=torch.int64, device=slots.memory.device)
        cache = slots.buffers(slice(None), states)
        self._run = capture(partial(decode_step, decoder, cache, states, log_n, longest, self.inputs))

    def __call__(self, inputs: Tensor) -> Tensor:
        """As `decode_step`; the next call of any step may overwrite what this returns."""
        count = inputs.shape[1]
        self.inputs[:, :count] = inputs
        self.inputs[:, count:] = inputs[:, :1]
        return self._run()[:count]
