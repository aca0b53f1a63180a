"""Linear layers of float32 weights by our own kernel, `float32.c`."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_int64, c_void_p

import torch
from torch import Tensor
from torch.nn.functional import pad

from apiary_server.model.backends.cpu.library import library

_COLUMNS = 48  # outputs that the kernel takes together


class _Linear(ctypes.Structure):
    """As in `float32.c`."""

    _fields_ = (
        *((name, c_int64) for name in ("rows", "inputs", "outputs")),
        ("input", c_void_p),
        ("input_row", c_int64),
        *((name, c_void_p) for name in ("weights", "bias", "output")),
    )


def supported() -> bool:
    """Whether the kernel was built, and this processor has its instructions."""
    try:
        return bool(library("float32").apiary_float32_supported())
    except OSError:
        return False


class Avx512:
    """A linear layer whose weight lies in the order in which it is read. Where this is `supported`.

    A row's result does not depend on how many others there are, not by a bit.

    Raises:
        OSError: the kernel was not built.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._linear = library("float32").apiary_float32_linear
        self._linear.argtypes, self._linear.restype = [POINTER(_Linear)], None
        self._outputs, self._inputs = weight.shape
        more = -self._outputs % _COLUMNS
        self._weights = (
            pad(weight, (0, 0, 0, more)).view(-1, _COLUMNS, self._inputs).transpose(1, 2).contiguous()
        )
        self._bias = None if bias is None else pad(bias, (0, more))

    def __call__(self, rows: Tensor) -> Tensor:
        if rows.stride(-1) != 1:
            rows = rows.contiguous()
        output = torch.empty(len(rows), self._outputs)
        self._linear(
            byref(
                _Linear(
                    rows=len(rows),
                    inputs=self._inputs,
                    outputs=self._outputs,
                    input=rows.data_ptr(),
                    input_row=rows.stride(0),
                    weights=self._weights.data_ptr(),
                    bias=None if self._bias is None else self._bias.data_ptr(),
                    output=output.data_ptr(),
                )
            )
        )
        return output
