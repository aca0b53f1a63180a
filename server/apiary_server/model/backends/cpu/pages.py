"""Memory in huge pages."""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor

_CHUNK = 2**26  # bytes that are asked of the system at a time; what is not used of them stays with it
_LINE = 64  # bytes that a processor reads together


class HugePages:
    """Memory in pages of 2 MiB, where the system has them, for what is read whole in every step: a processor
    asks ahead within a page, and not beyond it, and finds few pages faster than many. In pages of 4 KiB,
    one row's float32 products take half as long again.
    """

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)

    def keep(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of a tensor, in such memory."""
        size = tensor.numel() * tensor.element_size()
        if size > len(self._chunk):
            self._chunk = _mapped(max(size, _CHUNK))
        bytes_, self._chunk = self._chunk[:size], self._chunk[size + -size % _LINE :]
        return bytes_.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _mapped(size: int) -> Tensor:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
