"""Decoders on a CPU."""

from __future__ import annotations

import itertools
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from apiary_server.model.attention import Batch
from apiary_server.model.backends.cpu.operations import Kernels, fastest
from apiary_server.model.backends.cpu.panels import Panels
from apiary_server.model.backends.cpu.step import DecodeStep, by_kernels
from apiary_server.model.decoder import Decoder, ForeignStructure


class Cpu:
    """As `Backend`, for the Llama family in float32.

    Args:
        model: it is not changed, and may be dropped afterwards.
        weights: `fp32`, or `int8` for a quarter of the memory traffic.

    Raises:
        ForeignStructure: it is another kind of model, or not float32 on a CPU.
    """

    def __init__(self, model: PreTrainedModel, weights: Literal["fp32", "int8"]) -> None:
        if model.device.type != "cpu" or model.dtype != torch.float32:
            raise ForeignStructure(
                f"the backend cpu computes in float32, and not in {model.dtype} on {model.device}"
            )
        operations = fastest(weights)
        self._decoder = Decoder.of(model, operations)
        self._step = None
        if isinstance(operations, Kernels) and by_kernels(self._decoder):
            self._step = DecodeStep(self._decoder, operations)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def weight_bytes(self) -> int | None:
        """Of the linear layers, as they are kept and read in every step; None: a library keeps them."""
        decoder = self._decoder
        inner = ((each.qkv, each.output, each.gate_up, each.down) for each in decoder.layers)
        linears = [decoder.head, *itertools.chain.from_iterable(inner)]
        panels = [linear for linear in linears if isinstance(linear, Panels)]
        return sum(each.nbytes for each in panels) if len(panels) == len(linears) else None

    def forward(self, tokens: Tensor, positions: Tensor, keep: Tensor, batch: Batch) -> Tensor:
        step = self._step
        if step is not None and step.takes(keep, batch):
            return step(tokens, positions, keep, batch)
        return self._decoder.forward(tokens, positions, keep, batch)
