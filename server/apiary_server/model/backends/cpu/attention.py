"""Attention by our own kernels, `decode.c` and `chunk.c`, on the threads of torch."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int64, c_void_p
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from apiary_server.model.attention import ChunkRun, DecodeRun, chunk, decode
from apiary_server.model.backends.cpu.kernel import Kernel
from apiary_server.sessions.pool import SlotClass
from buzz import MAX_STATES
from buzz.quant import Packed

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
"""Of caches that are read, as `kernels.h` numbers them."""
_RULES = 64  # of a class of slots that are remembered
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


class _Run(ctypes.Structure):
    """As in `decode.c`."""

    _fields_ = (
        *((name, c_int64) for name in ("kv_heads", "dim", "type", "states")),
        *((name, c_void_p) for name in ("keys", "values")),
        *((name, c_int64) for name in ("cache_layer", "cache_slot", "cache_head")),
        *((name, c_void_p) for name in ("key_scales", "value_scales")),
        *((name, c_int64) for name in ("scale_layer", "scale_slot", "scale_head")),
        *((name, c_void_p) for name in ("slots", "lengths", "seen")),
        ("longest", c_int64),
        ("log_n", c_float),
        ("state", _State * MAX_STATES),
        ("packed", _Packed),
    )


class _Decode(ctypes.Structure):
    """As in `decode.c`."""

    _fields_ = (
        ("rows", c_int64),
        ("run", POINTER(_Run)),
        *((name, c_int64) for name in ("layer", "group")),
        ("queries", c_void_p),
        ("query_row", c_int64),
        *((name, c_void_p) for name in ("new_keys", "new_values")),
        *((name, c_int64) for name in ("new_key_row", "new_value_row")),
        ("output", c_void_p),
        ("scale", c_float),
    )


class _Chunk(ctypes.Structure):
    """As in `chunk.c`."""

    _fields_ = (
        *(
            (name, c_int64)
            for name in ("tokens", "layer", "entries", "kv_heads", "group", "dim", "type", "states")
        ),
        ("queries", c_void_p),
        ("query_row", c_int64),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("cache_head", c_int64),
        *((name, c_void_p) for name in ("key_scales", "value_scales")),
        ("scale_head", c_int64),
        ("output", c_void_p),
        ("seen", c_int64),
        ("scale", c_float),
        ("log_n", c_float),
        ("state", _State * MAX_STATES),
    )


class Decode:
    """`apiary_server.model.attention.decode`, in one pass over each cache. Not thread-safe.

    Raises:
        OSError: the kernel was not built.
    """

    def __init__(self) -> None:
        self._attend = Kernel("decode", "attend_decode")
        self._prepared: WeakKeyDictionary[DecodeRun, _Prepared | None] = WeakKeyDictionary()
        self._memories: WeakKeyDictionary[SlotClass, dict[object, _Run | None]] = WeakKeyDictionary()
        self._run = _Run()  # to which all tasks point

    def load(self, run: DecodeRun) -> bool:
        """Have this run's caches read by what follows, a tape that is played included; whether the kernel
        reads such."""
        if run not in self._prepared:
            memory = self._memory(run)
            self._prepared[run] = None if memory is None else _prepare(run, memory)
        prepared = self._prepared[run]
        if prepared is not None:
            ctypes.pointer(self._run)[0] = prepared.run
        return prepared is not None

    def _memory(self, run: DecodeRun) -> _Run | None:
        """`_memory_of`, once for all runs of a class of slots."""
        if run.home is None:
            return _memory_of(run)
        known, rule = self._memories.setdefault(run.home, {}), (run.states, run.log_n)
        if rule not in known:
            if len(known) >= _RULES:  # callers choose policies, and with them rules
                known.clear()
            known[rule] = _memory_of(run)
        return known[rule]

    def __call__(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float, run: DecodeRun
    ) -> Tensor:
        """As `decode`.

        Raises:
            MemoryError: there is none for one head's weights.
        """
        if not (_fit(queries, keys, values) and self.load(run)):
            return decode(layer, queries, keys, values, scale, run)
        output = self._attend.output(*queries.shape)
        self._attend(
            _Decode(
                rows=len(queries),
                run=ctypes.pointer(self._run),
                layer=layer,
                group=queries.shape[1] // keys.shape[1],
                queries=queries.data_ptr(),
                query_row=queries.stride(0),
                new_keys=keys.data_ptr(),
                new_values=values.data_ptr(),
                new_key_row=keys.stride(0),
                new_value_row=values.stride(0),
                output=output.data_ptr(),
                scale=scale,
            )
        )
        return output


class Chunk:
    """`apiary_server.model.attention.chunk`, tile by tile.

    Raises:
        OSError: the kernel was not built.
    """

    def __init__(self) -> None:
        self._attend = Kernel("chunk", "attend_chunk")

    def __call__(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float, run: ChunkRun
    ) -> Tensor:
        """As `chunk`.

        Raises:
            MemoryError: there is none for a tile's weights.
        """
        if not (_fit(queries, keys, values) and _readable(run)):
            return chunk(layer, queries, keys, values, scale, run)
        new = (part.transpose(0, 1) for part in (keys, values))
        cache, scales = run.cache, None
        if cache.packed is not None and cache.packed.most:
            cache_keys, cache_values = cache.extend(layer, run.entries, *new)
        else:
            cache.write((layer, slice(None), slice(run.entries, run.total)), *new)
            cache_keys, cache_values = cache.keys[layer], cache.values[layer]
            scales = None if cache.scales is None else cache.scales[layer]
        tokens, query_heads, dim = queries.shape
        kv_heads = keys.shape[1]
        output = self._attend.output(*queries.shape)
        task = _Chunk(
            layer=layer,
            tokens=tokens,
            entries=run.total,
            kv_heads=kv_heads,
            group=query_heads // kv_heads,
            dim=dim,
            type=TYPES[cache_keys.dtype],
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
        if scales is not None:
            task.key_scales, task.value_scales = (each.data_ptr() for each in scales)
            task.scale_head = scales.stride(1)
        self._attend(task)
        return output


@dataclass(frozen=True, slots=True)
class _Prepared:
    """`kept` is what the run points to and the `DecodeRun` does not have."""

    run: _Run
    kept: tuple[Tensor | None, ...]


def _memory_of(run: DecodeRun) -> _Run | None:
    """A run of these caches, but for which of them it has and what they hold. None: the kernel does not read
    such."""
    if not _readable(run):
        return None
    cache = run.cache
    memory = _Run(
        kv_heads=cache.keys.shape[2],
        dim=cache.keys.shape[4],
        type=TYPES[cache.keys.dtype],
        states=len(run.states),
        keys=cache.keys.data_ptr(),
        values=cache.values.data_ptr(),
        cache_layer=cache.keys.stride(1),
        cache_slot=cache.keys.stride(0),
        cache_head=cache.keys.stride(2),
        log_n=run.log_n or 0,
        state=_states(run),
    )
    if cache.scales is not None:
        keys, values = cache.scales.unbind(2)
        memory.key_scales, memory.value_scales = keys.data_ptr(), values.data_ptr()
        memory.scale_slot, memory.scale_layer, memory.scale_head, _ = keys.stride()
    return memory


def _prepare(run: DecodeRun, memory: _Run) -> _Prepared | None:
    """None: the kernel does not read such caches."""
    prepared, turns = _Run.from_buffer_copy(memory), None
    packed = run.cache.packed
    if packed is not None and packed.most:
        unpacking = _unpacking(packed, run)
        if unpacking is None:
            return None
        prepared.packed, turns = unpacking
    slots = torch.tensor(range(len(run.entries)) if run.slots is None else run.slots)
    lengths = run.entries + 1
    prepared.slots, prepared.lengths = slots.data_ptr(), lengths.data_ptr()
    prepared.seen, prepared.longest = run.seen.data_ptr(), run.most
    return _Prepared(prepared, (slots, lengths, turns))


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


def _fit(*heads: Tensor) -> bool:
    """Whether the kernels read such queries, keys and values."""
    return all(part.dtype == torch.float32 and part.stride()[1:] == (part.shape[-1], 1) for part in heads)


def _readable(run: DecodeRun | ChunkRun) -> bool:
    """Whether the kernels read such caches."""
    cache = run.cache
    return (
        cache.keys.dtype in TYPES
        and len(run.states) <= MAX_STATES
        and all(state.element_size() == 4 for state in cache.state.values())
    )
