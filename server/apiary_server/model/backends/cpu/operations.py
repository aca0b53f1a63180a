"""A decoder's operations on a CPU in float32: our kernels, where they were built and do what is asked."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import structlog
from torch import Tensor
from torch.nn import SiLU
from transformers.activations import SiLUActivation

from apiary_server.model.attention import ChunkRun, DecodeRun
from apiary_server.model.backends.cpu import compaction, float32, int8, sampling
from apiary_server.model.backends.cpu.attention import Chunk, Decode
from apiary_server.model.backends.cpu.elementwise import Elementwise
from apiary_server.model.backends.cpu.linear import Int8, Packed
from apiary_server.model.backends.cpu.pages import HugePages
from apiary_server.model.operations import Linear, Norm, Operations

_log = structlog.get_logger(__name__)

SILU = (SiLU, SiLUActivation)
"""Activations that `Kernels` has a kernel for."""


class Products(Operations):
    """Torch's operations, but for linear layers.

    Args:
        make: a linear layer of a weight `[out, in]` and a bias.
    """

    def __init__(self, make: Callable[[Tensor, Tensor | None], Linear]) -> None:
        self._make = make

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return self._make(weight, bias)


class Kernels(Products):
    """Everything by a kernel.

    Attributes:
        decoding: attention of sessions that decode.

    Raises:
        OSError: they were not built.
    """

    def __init__(self, make: Callable[[Tensor, Tensor | None], Linear]) -> None:
        super().__init__(make)
        self._elementwise = Elementwise()
        self.decoding, self._chunk = Decode(), Chunk()
        compaction.register()
        sampling.register()

    def add_norm(self, norm: Norm, rows: Tensor, more: Tensor | None) -> Tensor:
        return self._elementwise.add_norm(norm, rows, more)

    def rotate(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self._elementwise.rotate(heads, cos, sin)

    def take(self, rows: Tensor, index: Tensor) -> Tensor:
        return self._elementwise.take(rows, index)

    def gated(self, gate_up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        if isinstance(activation, SILU):
            return self._elementwise.gate(gate_up)
        return super().gated(gate_up, activation)

    def decode(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float, run: DecodeRun
    ) -> Tensor:
        return self.decoding(layer, queries, keys, values, scale, run)

    def chunk(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float, run: ChunkRun
    ) -> Tensor:
        return self._chunk(layer, queries, keys, values, scale, run)


def fastest(weights: Literal["fp32", "int8"]) -> Operations:
    """What this machine has."""
    make = _float32() if weights == "fp32" else _int8()
    try:
        return Kernels(make)
    except OSError as error:
        _log.warning(
            "the CPU kernels were not built, which makes every step slower: install again with a C compiler",
            reason=str(error),
        )
        return Products(make)


def _float32() -> Callable[[Tensor, Tensor | None], Linear]:
    return partial(float32.Avx512, memory=HugePages()) if float32.supported() else Packed


def _int8() -> Callable[[Tensor, Tensor | None], Linear]:
    if int8.supported():
        return partial(int8.Vnni, memory=HugePages())
    _log.warning("int8 weights run without their kernel, at half the speed: it needs AVX-512 VNNI")
    return Int8
