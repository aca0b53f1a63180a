"""Attention by our own kernels, `decode.c` and `chunk.c`, on the threads of torch."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from apiary_server.model.attention import ChunkRun, DecodeRun, chunk, decode
from apiary_server.model.backends.cpu.library import library
from buzz import MAX_STATES
from buzz.quant import Packed

_CACHES = (torch.float32, torch.bfloat16)
_LANES = 16  # bytes of codes that are unpacked together


class _State(ctypes.Structure):
    _fields_ = (
        ("into", c_void_p),
        ("layer", c_int64),
        ("slot", c_int64),
        ("head", c_int64),
        ("votes", c_int64),
        ("decay", c_float),
    )


class _Part(ctypes.Structure):
    """As in `packed.h`."""

    _fields_ = (("memory", c_void_p), ("layer", c_int64), ("slot", c_int64), ("head", c_int64))


class _Packed(ctypes.Structure):
    """As in `packed.h`."""

    _fields_ = (
        *((name, _Part) for name in ("keys", "values", "key_grids", "value_grids", "channels", "positions")),
        ("counts", c_void_p),
        ("turns", c_void_p),
        *((name, c_int64) for name in ("reach", "bits", "in_cache")),
    )


class _Decode(ctypes.Structure):
    """As in `decode.c`."""

    _fields_ = (
        *((name, c_int64) for name in ("layer", "rows", "kv_heads", "group", "dim", "bfloat16", "states")),
        ("queries", c_void_p),
        ("query_row", c_int64),
        ("new_keys", c_void_p),
        ("new_values", c_void_p),
        ("new_key_row", c_int64),
        ("new_value_row", c_int64),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("cache_layer", c_int64),
        ("cache_slot", c_int64),
        ("cache_head", c_int64),
        ("slots", c_void_p),
        ("lengths", c_void_p),
        ("seen", c_void_p),
        ("output", c_void_p),
        ("longest", c_int64),
        ("scale", c_float),
        ("log_n", c_float),
        ("state", _State * MAX_STATES),
        ("packed", _Packed),
    )


class _Chunk(ctypes.Structure):
    """As in `chunk.c`."""

    _fields_ = (
        *(
            (name, c_int64)
            for name in ("layer", "tokens", "entries", "kv_heads", "group", "dim", "bfloat16", "states")
        ),
        ("queries", c_void_p),
        ("query_row", c_int64),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("cache_head", c_int64),
        ("output", c_void_p),
        ("seen", c_int64),
        ("scale", c_float),
        ("log_n", c_float),
        ("state", _State * MAX_STATES),
    )


class Decode:
    """`apiary_server.model.attention.decode`, in one pass over each cache.

    Raises:
        OSError: the kernel was not built.
    """

    def __init__(self) -> None:
        self._attend = library("decode").apiary_attend_decode
        self._attend.argtypes, self._attend.restype = [POINTER(_Decode)], c_int
        self._runs: WeakKeyDictionary[DecodeRun, _Run | None] = WeakKeyDictionary()

    def __call__(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float, run: DecodeRun
    ) -> Tensor:
        """As `decode`.

        Raises:
            MemoryError: there is none for one head's weights.
        """
        if run not in self._runs:
            self._runs[run] = _prepared(queries, keys, values, scale, run)
        prepared = self._runs[run]
        if prepared is None:
            return decode(layer, queries, keys, values, scale, run)
        task = prepared.task
        output = torch.empty(queries.shape)
        task.layer = layer
        task.queries = queries.data_ptr()
        task.output = output.data_ptr()
        task.new_keys, task.new_values = keys.data_ptr(), values.data_ptr()
        if self._attend(byref(task)):
            raise MemoryError(f"no memory for the weights of {run.most} entries")
        return output


class Chunk:
    """`apiary_server.model.attention.chunk`, tile by tile.

    Raises:
        OSError: the kernel was not built.
    """

    def __init__(self) -> None:
        self._attend = library("chunk").apiary_attend_chunk
        self._attend.argtypes, self._attend.restype = [POINTER(_Chunk)], c_int

    def __call__(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float, run: ChunkRun
    ) -> Tensor:
        """As `chunk`.

        Raises:
            MemoryError: there is none for a tile's weights.
        """
        if not _fit(queries, keys, values, run):
            return chunk(layer, queries, keys, values, scale, run)
        new = (part.transpose(0, 1) for part in (keys, values))
        cache_keys, cache_values = run.cache.extend(layer, run.entries, *new)
        tokens, query_heads, dim = queries.shape
        kv_heads = keys.shape[1]
        output = torch.empty(queries.shape)
        task = _Chunk(
            layer=layer,
            tokens=tokens,
            entries=run.total,
            kv_heads=kv_heads,
            group=query_heads // kv_heads,
            dim=dim,
            bfloat16=cache_keys.dtype == torch.bfloat16,
            states=len(run.states),
            queries=queries.data_ptr(),
            query_row=queries.stride(0),
            keys=cache_keys.data_ptr(),
            values=cache_values.data_ptr(),
            cache_head=cache_keys.stride(0),
            output=output.data_ptr(),
            seen=run.seen,
            scale=scale,
            log_n=run.log_n or 0,
            state=_states(run),
        )
        if self._attend(byref(task)):
            raise MemoryError(f"no memory for the weights of {run.total} entries")
        return output


@dataclass(frozen=True, slots=True)
class _Run:
    """What is the same in all layers of a run; `kept` is what it points to and the run does not have."""

    task: _Decode
    kept: tuple[Tensor, ...]


def _prepared(queries: Tensor, keys: Tensor, values: Tensor, scale: float, run: DecodeRun) -> _Run | None:
    """None: the kernel does not read such tensors."""
    if not _fit(queries, keys, values, run):
        return None
    cache, packed, turns = run.cache, _Packed(), torch.empty(0)
    if cache.packed is not None and cache.packed.most:
        unpacking = _unpacking(cache.packed, run)
        if unpacking is None:
            return None
        packed, turns = unpacking
    slots = torch.tensor(range(len(queries)) if run.slots is None else run.slots)
    lengths = run.entries + 1
    task = _Decode(
        rows=len(queries),
        kv_heads=keys.shape[1],
        group=queries.shape[1] // keys.shape[1],
        dim=queries.shape[2],
        bfloat16=cache.keys.dtype == torch.bfloat16,
        states=len(run.states),
        query_row=queries.stride(0),
        new_key_row=keys.stride(0),
        new_value_row=values.stride(0),
        keys=cache.keys.data_ptr(),
        values=cache.values.data_ptr(),
        cache_layer=cache.keys.stride(1),
        cache_slot=cache.keys.stride(0),
        cache_head=cache.keys.stride(2),
        slots=slots.data_ptr(),
        lengths=lengths.data_ptr(),
        seen=run.seen.data_ptr(),
        longest=run.most,
        scale=scale,
        log_n=run.log_n or 0,
        state=_states(run),
        packed=packed,
    )
    return _Run(task, (slots, lengths, turns))


def _unpacking(packed: Packed, run: DecodeRun) -> tuple[_Packed, Tensor] | None:
    """How packed entries are read, and the rotations to which that points; None: the kernel does not read
    such."""
    tensors = (*packed.tensors, run.cache.position)
    if (
        packed.rotary is None
        or isinstance(packed.in_cache, Tensor)
        or not isinstance(packed.count, Tensor)
        or packed.rotary.dim != packed.channels.shape[-1]
        or packed.key_codes.shape[-1] % _LANES
        or not all(tensor[0, 0, 0].is_contiguous() for tensor in tensors)
    ):
        return None
    turns = packed.rotary.turns(packed.most if packed.in_cache else int(run.seen.max()))
    unpacking = _Packed(
        *(_Part(t.data_ptr(), t.stride(1), t.stride(0), t.stride(2)) for t in tensors),
        counts=packed.count.data_ptr(),
        turns=turns.data_ptr(),
        reach=len(turns),
        bits=packed.bits,
        in_cache=packed.in_cache,
    )
    return unpacking, turns


def _states(run: DecodeRun | ChunkRun) -> ctypes.Array[_State]:
    """What a run records: states are `[layers, kv_heads, entries]`, of several sessions with rows before."""
    states = (_State * MAX_STATES)()
    for state, into in zip(run.states, states, strict=False):
        tensor = run.cache.state[state.name]
        into.into = tensor.data_ptr()
        into.layer, into.head = tensor.stride(-3), tensor.stride(-2)
        into.slot = tensor.stride(0) if tensor.dim() == 4 else 0
        into.votes, into.decay = state.kind == "vote", state.decay
    return states


def _fit(queries: Tensor, keys: Tensor, values: Tensor, run: DecodeRun | ChunkRun) -> bool:
    """Whether the kernels read such tensors."""
    dim, cache = queries.shape[-1], run.cache
    return (
        all(part.dtype == torch.float32 and part.stride()[1:] == (dim, 1) for part in (queries, keys, values))
        and cache.keys.dtype in _CACHES
        and len(run.states) <= MAX_STATES
        and all(state.element_size() == 4 for state in cache.state.values())
    )
