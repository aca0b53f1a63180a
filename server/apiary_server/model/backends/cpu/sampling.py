"""What sampling takes time for, by our own kernel, `sampling.c`: an operator of the sampler."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from apiary_server.model import sampler
from apiary_server.model.backends.cpu.kernel import Kernel, registered


class _Likeliest(ctypes.Structure):
    """As in `sampling.c`."""

    _fields_ = (
        *((name, c_int64) for name in ("rows", "size")),
        ("input", c_void_p),
        ("stride", c_int64),
        *((name, c_void_p) for name in ("tokens", "largest")),
    )


@functools.cache
def register() -> torch.library.Library:
    """Let logits on a CPU be looked through by the kernel, in this process and for good.

    Raises:
        OSError: it was not built.
    """
    return registered("apiary", "sampling", likeliest=_likeliest)


def _likeliest(kernel: Kernel, logits: Tensor) -> tuple[Tensor, Tensor]:
    if logits.dtype != torch.float32 or logits.dim() != 2 or logits.stride(1) != 1 or not logits.shape[1]:
        return sampler.default_likeliest(logits)
    rows = len(logits)
    tokens, largest = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
    at = (logits.data_ptr(), logits.stride(0), tokens.data_ptr(), largest.data_ptr())
    kernel(_Likeliest(*logits.shape, *at), alone=rows <= 1)
    return tokens, largest
