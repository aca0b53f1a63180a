"""Decoders on an NVIDIA GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from apiary_server.model.attention import Batch, ChunkRun, DecodeRun
from apiary_server.model.backends.cuda.graphs import Capture, Compute, Graphs
from apiary_server.model.backends.cuda.step import DecodeStep
from apiary_server.model.decoder import Decoder, ForeignStructure
from apiary_server.model.operations import Operations
from apiary_server.sessions.pool import SlotClass

_STEPS = 64  # captured; the least recently used is forgotten for a new one
_Run = TypeVar("_Run", DecodeRun, ChunkRun)


class Cuda:
    """As `Backend`, for the Llama family in the model's own dtype.

    Sessions that decode run in CUDA graphs: for each class of slots one `DecodeStep`, of the next larger of a
    few sizes. Prompts run as they come, and so do sessions that decode over quantised entries, whose counts
    shape the work; for the latter the host waits in every layer. The head follows behind all of them, since
    which rows reach it changes from step to step.

    Args:
        model: it is not changed.
        capture: makes decode steps fast; by default CUDA graphs.

    Raises:
        ForeignStructure: it is another kind of model, or not on a GPU.
    """

    def __init__(self, model: PreTrainedModel, capture: Capture | None = None) -> None:
        if capture is None and model.device.type != "cuda":
            raise ForeignStructure(f"the backend cuda computes on a GPU, and not on {model.device}")
        self._device, self._dtype = model.device, model.dtype
        self._decoder = Decoder.of(model, Operations())
        step = partial(DecodeStep, self._decoder, capture or Graphs(model.device))
        self._step = lru_cache(_STEPS)(step)

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @torch.inference_mode()
    def forward(self, tokens: Tensor, positions: Tensor, keep: Tensor, batch: Batch) -> Tensor:
        rest = Batch(chunks=batch.chunks)
        # all are prepared before one is launched: a copy from the host waits for what was
        parts = []
        for run in batch.decodes:
            packed = run.cache.packed
            if run.home is None or run.slots is None or (packed is not None and packed.most):
                rest.decodes.append(run)
            else:
                parts.append(self._decoding(run, run.home, run.slots, tokens, positions))
        eager = [self._as_it_comes(rest, tokens, positions)] if rest.decodes or rest.chunks else []
        width = len(self._decoder.norm.weight)
        hidden = torch.empty(len(tokens), width, dtype=self._dtype, device=self._device)
        for rows, compute in parts:
            hidden[rows] = compute()
        batch.meanwhile()  # now, since the host may have to wait in what is not captured
        for rows, compute in eager:
            hidden[rows] = compute()
        return self._decoder.logits(hidden[keep])

    def _decoding(
        self, run: DecodeRun, home: SlotClass, slots: Sequence[int], tokens: Tensor, positions: Tensor
    ) -> tuple[Tensor, Compute]:
        """Which rows these are, and what computes them."""
        rows, places = self._tensor([_rows([run]), slots])
        inputs = torch.stack([tokens[rows], positions[rows], places, run.entries, run.seen])
        longest = min(_longest(run.most), run.cache.dense)
        step = self._step(home, run.states, run.log_n, _padded(len(slots)), longest)
        return rows, partial(step, inputs)

    def _as_it_comes(self, batch: Batch, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Compute]:
        """The same for what is not captured."""
        rows = self._tensor([*_rows(batch.decodes), *_rows(batch.chunks)])
        decodes = _moved(batch.decodes, 0)
        chunks = _moved(batch.chunks, decodes[-1].rows.stop if decodes else 0)
        return rows, partial(self._decoder.hidden, tokens[rows], positions[rows], Batch(decodes, chunks))

    def _tensor(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


def _rows(runs: Sequence[DecodeRun | ChunkRun]) -> list[int]:
    return [row for run in runs for row in range(run.rows.start, run.rows.stop)]


def _moved(runs: Sequence[_Run], start: int) -> list[_Run]:
    """The same runs over rows behind each other, from `start` on."""
    moved = []
    for run in runs:
        stop = start + run.rows.stop - run.rows.start
        moved.append(replace(run, rows=slice(start, stop)))
        start = stop
    return moved


def _padded(count: int) -> int:
    """1, 2, 4, 8, 16, 24, 32, ..."""
    return 1 << (count - 1).bit_length() if count <= 8 else -(-count // 8) * 8


def _longest(most: int) -> int:
    """Multiples of 256, and from 2,048 on of an eighth to a quarter of what is asked for."""
    step = 1 << max(8, most.bit_length() - 3)
    return -(-most // step) * step
