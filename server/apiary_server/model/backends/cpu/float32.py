"""Linear layers of float32 weights by our own kernel, `float32.c`."""

from __future__ import annotations

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

    Raises:
        OSError: the kernel was not built.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, memory: HugePages | None = None) -> None:
        outputs, inputs = weight.shape
        blocks = pad(weight, (0, 0, 0, -outputs % COLUMNS)).view(-1, COLUMNS, inputs)
        super().__init__("float32", weight.shape, blocks.transpose(1, 2), bias, memory)
