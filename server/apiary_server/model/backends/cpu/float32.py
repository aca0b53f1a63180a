"""Linear layers of float32 weights by our own kernel, `float32.c`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from apiary_server.model.backends.cpu import panels
from apiary_server.model.backends.cpu.pages import HugePages
from apiary_server.model.backends.cpu.panels import COLUMNS, Panels


def supported() -> bool:
    """As `panels.supported`."""
    return panels.supported("float32")


class Avx512(Panels):
    """Where it is `supported`. A row's result does not depend on how many others there are, not by a bit.

    Weights that are bfloat16 numbers, as in most checkpoints, are kept as such: in half the memory, with the
    same results.

    Raises:
        OSError: the kernel was not built.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, memory: HugePages | None = None) -> None:
        outputs, inputs = weight.shape
        blocks = pad(weight, (0, 0, 0, -outputs % COLUMNS)).view(-1, COLUMNS, inputs).transpose(1, 2)
        halves = blocks.bfloat16()
        if inputs % 2 == 0 and torch.equal(halves.float(), blocks):
            blocks = halves.unflatten(1, (-1, 2)).transpose(2, 3)
        super().__init__("float32", weight.shape, blocks, bias, memory)
