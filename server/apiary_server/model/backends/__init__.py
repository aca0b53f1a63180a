"""How a model's compute runs: one file a way, behind the interface of `base`."""

from __future__ import annotations

from typing import Literal

import torch
from transformers import PreTrainedModel

from apiary_server.model.backends.base import Backend
from apiary_server.model.backends.cpu import Cpu
from apiary_server.model.backends.cuda import Cuda
from apiary_server.model.backends.reference import Reference
from apiary_server.model.decoder import ForeignStructure

Kind = Literal["auto", "reference", "cpu", "cuda"]
Weights = Literal["fp32", "int8"]

__all__ = ["Backend", "ForeignStructure", "Kind", "Reference", "Weights", "choose"]


def choose(kind: Kind, weights: Weights, model: PreTrainedModel) -> Backend:
    """The backend that is asked for; `auto`: the fastest that takes the model as it is.

    Raises:
        ForeignStructure: the backend does not take this model, its device, its dtype or such weights.
    """
    if kind == "auto":
        kind = _fastest(model.device.type, model.dtype)
    if weights != "fp32" and kind != "cpu":
        raise ForeignStructure(f"the backend {kind} keeps weights as they are, and not as {weights}")
    if kind == "cpu":
        return Cpu(model, weights)
    return Cuda(model) if kind == "cuda" else Reference(model)


def _fastest(device: str, dtype: torch.dtype) -> Kind:
    if device == "cuda":
        return "cuda"
    return "cpu" if device == "cpu" and dtype == torch.float32 else "reference"
