"""Decoders on a CPU."""

from __future__ import annotations

from typing import Literal

import structlog
import torch
from torch import Tensor
from transformers import PreTrainedModel

from apiary_server.model.attention import Batch, Decode, decode
from apiary_server.model.backends.cpu.attention import Attention
from apiary_server.model.backends.cpu.int8 import Vnni
from apiary_server.model.backends.cpu.linear import Int8, Packed
from apiary_server.model.decoder import Decoder, ForeignStructure, MakeLinear

_log = structlog.get_logger(__name__)


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
        self._decoder = Decoder.of(model, _make(weights), _attention())

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def forward(self, tokens: Tensor, positions: Tensor, keep: Tensor, batch: Batch) -> Tensor:
        return self._decoder.forward(tokens, positions, keep, batch)


def _make(weights: Literal["fp32", "int8"]) -> MakeLinear:
    if weights == "fp32":
        return Packed
    try:
        Vnni(torch.zeros(1, 1), None)
    except OSError as error:
        _log.warning("int8 weights run without their kernel, at half the speed", reason=str(error))
        return Int8
    return Vnni


def _attention() -> Decode:
    try:
        return Attention()
    except OSError as error:
        _log.warning(
            "attention runs without its kernel, more slowly: install again with a C compiler",
            reason=str(error),
        )
        return decode
