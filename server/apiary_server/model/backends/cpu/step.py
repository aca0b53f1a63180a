"""A decode step as one call: what the kernels do for it, on a tape."""

from __future__ import annotations

import torch
from torch import Tensor

from apiary_server.model.attention import Batch
from apiary_server.model.backends.cpu.operations import SILU, Kernels
from apiary_server.model.backends.cpu.panels import Panels
from apiary_server.model.backends.cpu.tape import Tape
from apiary_server.model.decoder import Decoder

_LEAST = 16  # rows that memory is taken for at first


def by_kernels(decoder: Decoder) -> bool:
    """Whether our kernels do all that a decode step needs: only they can be recorded."""
    return (
        isinstance(decoder.operations, Kernels)
        and isinstance(decoder.activation, SILU)
        and isinstance(decoder.layers[0].qkv, Panels)
        and all(layer.q_norm is None and layer.k_norm is None for layer in decoder.layers)
    )


class DecodeStep:
    """One new token for each of B sessions, whose caches are alike: as `Backend.forward`. It is recorded for
    as many as there ever were, rounded up, and then played for any number.

    Args:
        decoder: the model, which computes by `kernels`.
        kernels: its operations.
    """

    def __init__(self, decoder: Decoder, kernels: Kernels) -> None:
        self._decoder, self._kernels = decoder, kernels
        self._capacity = 0

    def takes(self, keep: Tensor, batch: Batch) -> bool:
        """Whether these are such sessions, of which all logits are wanted, in any order."""
        if batch.chunks or len(batch.decodes) != 1:
            return False
        run = batch.decodes[0]
        return len(keep) == len(run.entries) and self._kernels.decoding.load(run)

    @torch.no_grad()
    def __call__(self, tokens: Tensor, positions: Tensor, keep: Tensor, batch: Batch) -> Tensor:
        """As `Backend.forward`.

        Raises:
            MemoryError: there is none for what attention needs.
        """
        count = len(tokens)
        if count > self._capacity:
            self._record(max(_LEAST, 1 << (count - 1).bit_length()), batch)
        cos, sin = self._decoder.turns(positions)
        inputs = (self._decoder.embed(tokens), cos, sin, keep)
        for memory, given in zip(self._inputs, inputs, strict=True):
            memory[:count] = given
        self._kernels.decoding.load(batch.decodes[0])
        batch.meanwhile()
        self._tape(count)
        return self._decoder.head(self._normed[:count])

    def _record(self, capacity: int, like: Batch) -> None:
        width, half = len(self._decoder.norm.weight), self._decoder.head_dim // 2
        tape = Tape()
        with torch.inference_mode(False):  # else a later step in another mode could not write to it
            rows, keep = torch.empty(capacity, width), torch.empty(capacity, dtype=torch.int64)
            cos, sin = torch.empty(2, capacity, 1, half)
            with tape.recording():
                normed = self._decoder.normed(rows, cos, sin, keep, like)
        self._tape, self._inputs, self._normed, self._capacity = (
            tape,
            (rows, cos, sin, keep),
            normed,
            capacity,
        )
