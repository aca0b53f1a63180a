"""Decoders on an NVIDIA GPU."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from apiary_server.model.attention import Batch
from apiary_server.model.decoder import Decoder
from apiary_server.model.operations import Operations


class Cuda:
    """As `Backend`, for the Llama family.

    Args:
        model: it is not changed.

    Raises:
        ForeignStructure: it is another kind of model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._device, self._dtype = model.device, model.dtype
        self._decoder = Decoder.of(model, Operations())

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def forward(self, tokens: Tensor, positions: Tensor, keep: Tensor, batch: Batch) -> Tensor:
        return self._decoder.forward(tokens, positions, keep, batch)
