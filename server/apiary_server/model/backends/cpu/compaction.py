"""What compactions take time for, by our own kernels, `compaction.c`: operators of `buzz`."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from apiary_server.model.backends.cpu.attention import TYPES
from apiary_server.model.backends.cpu.kernel import Kernel, registered
from buzz import norms, ranking

_MANY = 2**12
"""Entries that several threads share: policies are tried on few, by whichever thread parses one."""


class _Norms(ctypes.Structure):
    """As in `compaction.c`, like those below."""

    _fields_ = (
        *((name, c_int64) for name in ("rows", "heads", "entries", "dim", "type")),
        ("values", c_void_p),
        *((name, c_int64) for name in ("layer", "head")),
        ("scales", c_void_p),
        *((name, c_int64) for name in ("scale_layer", "scale_head")),
        ("output", c_void_p),
    )


class _Honeycomb(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("rows", "entries", "hot", "cells")),
        *((name, c_void_p) for name in ("score", "ranks", "kept")),
    )


class _Keep(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("rows", "heads", "kept", "bytes")),
        ("source", c_void_p),
        *((name, c_int64) for name in ("source_layer", "source_head")),
        ("target", c_void_p),
        *((name, c_int64) for name in ("target_layer", "target_head")),
        ("index", c_void_p),
    )


@functools.cache
def register() -> torch.library.Library:
    """Let tensors on a CPU be compacted by the kernels, in this process and for good.

    Raises:
        OSError: they were not built.
    """
    return registered("buzz", "compaction", norms=_norms, honeycomb=_honeycomb, keep=_keep)


def _norms(kernel: Kernel, entries: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    layers, heads, count, dim = entries.shape
    readable = entries.dtype in TYPES and dtype == torch.float32 and entries.stride()[2:] == (dim, 1)
    readable &= (entries.dtype == torch.int8) == (scales is not None)
    if scales is not None:
        readable &= scales.dtype == torch.float32 and scales.stride(2) == 1
    if not readable:
        return norms.default_norms(entries, scales, dtype)
    output = torch.empty(entries.shape[:-1])
    task = _Norms(
        rows=layers,
        heads=heads,
        entries=count,
        dim=dim,
        type=TYPES[entries.dtype],
        values=entries.data_ptr(),
        layer=entries.stride(0),
        head=entries.stride(1),
        output=output.data_ptr(),
    )
    if scales is not None:
        task.scales, task.scale_layer, task.scale_head = scales.data_ptr(), *scales.stride()[:2]
    kernel(task, alone=output.numel() < _MANY)
    return output


def _honeycomb(kernel: Kernel, score: Tensor, hot: int, cells: int) -> Tensor:
    if score.dtype != torch.float32:
        return ranking.default_honeycomb(score, hot, cells)
    *rows, entries = score.shape
    score, ranks = score.contiguous(), torch.empty(score.shape, dtype=torch.int32)
    kept = torch.empty(*rows, hot + cells, dtype=torch.int64)
    count = score.numel() // max(entries, 1)
    task = _Honeycomb(count, entries, hot, cells, score.data_ptr(), ranks.data_ptr(), kept.data_ptr())
    kernel(task, alone=score.numel() < _MANY)
    return kept


def _keep(kernel: Kernel, source: Tensor, target: Tensor, index: Tensor) -> None:
    layers, heads, kept = index.shape
    size = source.element_size()
    index = index.contiguous()
    kernel(
        _Keep(
            rows=layers,
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
        ),
        alone=index.numel() < _MANY,
    )
