"""`buzz::keep` by our own kernel, `moving.c`."""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, byref, c_int64, c_void_p

import torch
from torch import Tensor

from apiary_server.model.backends.cpu.library import library


class _Keep(ctypes.Structure):
    """As in `moving.c`."""

    _fields_ = (
        *((name, c_int64) for name in ("layers", "heads", "kept", "bytes")),
        ("source", c_void_p),
        *((name, c_int64) for name in ("source_layer", "source_head")),
        ("target", c_void_p),
        *((name, c_int64) for name in ("target_layer", "target_head")),
        ("index", c_void_p),
    )


@functools.cache
def register() -> torch.library.Library:
    """Let tensors on a CPU be moved by the kernel, in this process and for good.

    Raises:
        OSError: it was not built.
    """
    keep = library("moving").apiary_keep
    keep.argtypes, keep.restype = [POINTER(_Keep)], None
    operators = torch.library.Library("buzz", "IMPL")
    operators.impl("keep", functools.partial(_keep, keep), "CPU")
    return operators


def _keep(kernel: ctypes._NamedFuncPointer, source: Tensor, target: Tensor, index: Tensor) -> None:
    layers, heads, kept = index.shape
    size = source.element_size()
    index = index.contiguous()
    kernel(
        byref(
            _Keep(
                layers=layers,
                heads=heads,
                kept=kept,
                bytes=source.shape[-1] * size,
                source=source.data_ptr(),
                source_layer=source.stride(0) * size,
                source_head=source.stride(1) * size,
                target=target.data_ptr(),
                target_layer=target.stride(0) * size,
                target_head=target.stride(1) * size,
                index=index.data_ptr(),
            )
        )
    )
