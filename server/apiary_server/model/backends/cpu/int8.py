"""Linear layers of eight-bit weights by our own kernel, `int8.c`."""

from __future__ import annotations

from ctypes import c_int64, c_void_p

import torch
from torch import Tensor
from torch.nn.functional import pad

from apiary_server.model.backends.cpu import panels
from apiary_server.model.backends.cpu.library import library
from apiary_server.model.backends.cpu.linear import quantised, signs
from apiary_server.model.backends.cpu.pages import HugePages
from apiary_server.model.backends.cpu.panels import COLUMNS, Panels

_QUAD = 4  # inputs that the kernel takes together
_INPUTS = 2**16  # more could overflow its 32-bit sums


def supported() -> bool:
    """As `panels.supported`."""
    return panels.supported("int8")


class Vnni(Panels):
    """As `linear.Int8`, in instructions that multiply and add bytes (AVX-512 VNNI): twice as fast. Where they
    are `supported`.

    Raises:
        OSError: the kernel was not built.
        ValueError: more inputs than its sums can hold.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, memory: HugePages | None = None) -> None:
        outputs, inputs = weight.shape
        if inputs > _INPUTS:
            raise ValueError(f"{inputs} inputs are more than {_INPUTS}")
        flips = signs(inputs)
        codes, scales = quantised(_turned(weight, flips))
        more = -outputs % COLUMNS
        codes = pad(codes, (0, -inputs % _QUAD, 0, more))
        blocks = codes.view(-1, COLUMNS, codes.shape[1] // _QUAD, _QUAD)
        super().__init__(
            "int8",
            weight.shape,
            blocks.transpose(1, 2),
            bias,
            memory,
            scales=pad(scales, (0, more)),
            offsets=128 * codes.sum(dim=1, dtype=torch.int32),
            signs=flips,
        )


def _turned(weight: Tensor, flips: Tensor) -> Tensor:
    """As `linear.turned`, by the kernel."""
    turn = library("int8").apiary_int8_turn
    turn.argtypes, turn.restype = [c_void_p, c_int64, c_int64, c_void_p], None
    weight = weight.float().clone(memory_format=torch.contiguous_format)
    turn(weight.data_ptr(), *weight.shape, flips.data_ptr())
    return weight
