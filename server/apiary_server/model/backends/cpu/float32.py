"""Linear layers of float32 weights by our own kernel, `float32.c`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from apiary_server.model.backends.cpu import panels
from apiary_server.model.backends.cpu.codes import GROUP, decomposed
from apiary_server.model.backends.cpu.pages import HugePages
from apiary_server.model.backends.cpu.panels import COLUMNS, Panels

_WHOLE, _HALVES, _CODES = range(3)
"""How a panel lies in memory, as in `float32.c`."""


def supported() -> bool:
    """As `panels.supported`."""
    return panels.supported("float32")


class Avx512(Panels):
    """Where it is `supported`. A row's result does not depend on how many others there are, not by a bit.

    Weights that are bfloat16 numbers, as in most checkpoints, are kept as such, and those of a quantised file
    as its codes: in a half or a third of the memory, with the same results.

    Raises:
        OSError: the kernel was not built.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, memory: HugePages | None = None) -> None:
        kind, weights = _packed(pad(weight, (0, 0, 0, -len(weight) % COLUMNS)))
        super().__init__("float32", weight.shape, weights, bias, memory, kind=kind)


def _packed(weight: Tensor) -> tuple[int, Tensor]:
    """The panels of a weight, as small as it can be without a change."""
    inputs, halves = weight.shape[1], weight.bfloat16()
    if inputs % 2 == 0 and torch.equal(halves.float(), weight):
        return _HALVES, _panels(halves).unflatten(1, (-1, 2)).transpose(2, 3)
    codes = decomposed(weight)
    if codes is None:
        return _WHOLE, _panels(weight)
    scales, least = (_panels(part).contiguous().view(torch.uint8) for part in (codes.scales, codes.least))
    each = _panels(codes.codes).reshape(len(scales), inputs // GROUP, -1)
    return _CODES, torch.cat([scales, least, each], dim=-1)


def _panels(weight: Tensor) -> Tensor:
    """`[outputs, inputs]` to `[outputs / COLUMNS, inputs, COLUMNS]`."""
    return weight.view(-1, COLUMNS, weight.shape[1]).transpose(1, 2)
