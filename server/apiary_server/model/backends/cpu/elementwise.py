"""Normalisation, rotation and the gate by our own kernels, `elementwise.c`: one pass over the rows each,
where torch takes several."""

from __future__ import annotations

from ctypes import c_float, c_int64, c_void_p

import torch
from torch import Tensor

from apiary_server.model.backends.cpu.library import library
from apiary_server.model.operations import Norm


class Elementwise:
    """On float32 rows.

    Raises:
        OSError: the kernels were not built.
    """

    def __init__(self) -> None:
        kernels = library("elementwise")
        self._norm, self._rotate, self._gate = (
            getattr(kernels, f"apiary_{name}") for name in ("norm", "rotate", "gate")
        )
        counts = [c_int64, c_int64]
        self._norm.argtypes = [*counts, c_void_p, c_void_p, c_void_p, c_float, c_void_p]
        self._rotate.argtypes = [*counts, c_int64, c_int64, c_void_p, c_void_p, c_void_p]
        self._gate.argtypes = [*counts, c_void_p, c_void_p]

    def add_norm(self, norm: Norm, rows: Tensor, more: Tensor | None) -> Tensor:
        """As `Operations.add_norm`."""
        output = torch.empty(rows.shape)
        more_at = None if more is None else more.data_ptr()
        self._norm(*rows.shape, rows.data_ptr(), more_at, norm.weight.data_ptr(), norm.eps, output.data_ptr())
        return output

    def rotate(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """As `Operations.rotate`, in place. A row's heads lie behind each other."""
        count, number, dim = heads.shape
        self._rotate(
            count, number, dim // 2, heads.stride(0), heads.data_ptr(), cos.data_ptr(), sin.data_ptr()
        )
        return heads

    def gate(self, gate_up: Tensor) -> Tensor:
        """The first half of contiguous rows `[T, 2 * inner]` through SiLU, times the second: `[T, inner]`."""
        count, inner = gate_up.shape[0], gate_up.shape[1] // 2
        output = torch.empty(count, inner)
        self._gate(count, inner, gate_up.data_ptr(), output.data_ptr())
        return output
