"""Linear layers of eight-bit weights by our own kernel, `int8.c`."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_int, c_int64, c_void_p

import torch
from torch import Tensor
from torch.nn.functional import pad

from apiary_server.model.backends.cpu.library import library
from apiary_server.model.backends.cpu.linear import quantised

_COLUMNS, _QUAD = 48, 4  # outputs and inputs that the kernel takes together
_INPUTS = 2**16  # more could overflow its 32-bit sums


class _Linear(ctypes.Structure):
    """As in `int8.c`."""

    _fields_ = (
        *((name, c_int64) for name in ("rows", "inputs", "outputs")),
        ("input", c_void_p),
        ("input_row", c_int64),
        *((name, c_void_p) for name in ("weights", "scales", "offsets", "bias", "output")),
    )


def supported() -> bool:
    """Whether the kernel was built, and this processor has its instructions."""
    try:
        return bool(library("int8").apiary_int8_supported())
    except OSError:
        return False


class Vnni:
    """As `linear.Int8`, in instructions that multiply and add bytes (AVX-512 VNNI): twice as fast. Where they
    are `supported`.

    Raises:
        OSError: the kernel was not built.
        ValueError: more inputs than its sums can hold.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._linear = library("int8").apiary_int8_linear
        self._linear.argtypes, self._linear.restype = [POINTER(_Linear)], c_int
        self._outputs, self._inputs = weight.shape
        if self._inputs > _INPUTS:
            raise ValueError(f"{self._inputs} inputs are more than {_INPUTS}")
        codes, scale = quantised(weight)
        more = -self._outputs % _COLUMNS
        codes = pad(codes, (0, -self._inputs % _QUAD, 0, more))
        blocks = codes.view(-1, _COLUMNS, codes.shape[1] // _QUAD, _QUAD)
        self._weights = blocks.transpose(1, 2).contiguous()
        self._offsets = 128 * codes.sum(dim=1, dtype=torch.int32)
        self._scales = pad(scale, (0, more))
        self._bias = None if bias is None else pad(bias, (0, more))

    def __call__(self, rows: Tensor) -> Tensor:
        if rows.stride(-1) != 1:
            rows = rows.contiguous()
        output = torch.empty(len(rows), self._outputs)
        task = _Linear(
            rows=len(rows),
            inputs=self._inputs,
            outputs=self._outputs,
            input=rows.data_ptr(),
            input_row=rows.stride(0),
            weights=self._weights.data_ptr(),
            scales=self._scales.data_ptr(),
            offsets=self._offsets.data_ptr(),
            bias=None if self._bias is None else self._bias.data_ptr(),
            output=output.data_ptr(),
        )
        if self._linear(byref(task)):
            raise MemoryError(f"no memory for the digits of {len(rows)} rows")
        return output
