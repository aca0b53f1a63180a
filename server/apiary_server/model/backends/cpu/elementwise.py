"""Normalisation, rotation and the gate by our own kernels, `elementwise.c`: one pass over the rows each,
where torch takes several."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p

from torch import Tensor

from apiary_server.model.backends.cpu.kernel import Kernel
from apiary_server.model.operations import Norm


class _Norm(ctypes.Structure):
    """As in `elementwise.c`, like those below."""

    _fields_ = (
        *((name, c_int64) for name in ("rows", "size")),
        *((name, c_void_p) for name in ("input", "more", "weight", "output")),
        ("eps", c_float),
    )


class _Rotate(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("rows", "heads", "half", "stride")),
        *((name, c_void_p) for name in ("input", "cosines", "sines")),
    )


class _Gate(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("rows", "size")),
        *((name, c_void_p) for name in ("input", "output")),
    )


class _Take(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("rows", "size")),
        *((name, c_void_p) for name in ("input", "index", "output")),
    )


class Elementwise:
    """On float32 rows.

    Raises:
        OSError: the kernels were not built.
    """

    def __init__(self) -> None:
        self._norm, self._rotate, self._gate, self._take = (
            Kernel("elementwise", name) for name in ("norm", "rotate", "gate", "take")
        )

    def add_norm(self, norm: Norm, rows: Tensor, more: Tensor | None) -> Tensor:
        """As `Operations.add_norm`."""
        output = self._norm.output(*rows.shape)
        more_at = None if more is None else more.data_ptr()
        self._norm(
            _Norm(*rows.shape, rows.data_ptr(), more_at, norm.weight.data_ptr(), output.data_ptr(), norm.eps)
        )
        return output

    def rotate(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """As `Operations.rotate`, in place. A row's heads lie behind each other."""
        count, number, dim = heads.shape
        at = (heads.data_ptr(), cos.data_ptr(), sin.data_ptr())
        self._rotate(_Rotate(count, number, dim // 2, heads.stride(0), *at))
        return heads

    def gate(self, gate_up: Tensor) -> Tensor:
        """The first half of contiguous rows `[T, 2 * inner]` through SiLU, times the second: `[T, inner]`."""
        count, inner = gate_up.shape[0], gate_up.shape[1] // 2
        output = self._gate.output(count, inner)
        self._gate(_Gate(count, inner, gate_up.data_ptr(), output.data_ptr()))
        return output

    def take(self, rows: Tensor, index: Tensor) -> Tensor:
        """As `Operations.take`, of contiguous rows."""
        output = self._take.output(len(index), rows.shape[1])
        self._take(_Take(*output.shape, rows.data_ptr(), index.data_ptr(), output.data_ptr()))
        return output
