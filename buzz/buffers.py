"""The memory in which a session's entries lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from buzz.eight_bits import rounded, widened
from buzz.norms import norms
from buzz.policy import State
from buzz.quant import Packed
from buzz.rotary import Rotary

Index = int | slice | Tensor


@dataclass
class Buffers:
    """Memory for a session's entries, L layers of H KV heads: fresh tensors, or views into a pool's slot.

    Where there is packed memory, the first entries may lie there in few bits; entry i is then found at
    `keys[:, :, i - packed]`. A leading dimension of B sessions may come before all shapes.

    Attributes:
        keys: floating `[L, H, D, head_dim]`, rotated: the entries that are not packed. Or int8, see `scales`.
        values: the same.
        position: int32 `[L, H, C]`, each entry's original token position.
        state: by name, `[L, H, C]`: what policies declared in `states`; others are not touched.
        packed: memory for quantised entries; required by policies that quantise.
        scales: float32 `[L, 2, H, D]`, of keys and of values, where these are int8: see `buzz.eight_bits`.
        capacity: entries that fit, C.
        dense: of them, those that fit unquantised, D.

    Raises:
        ValueError: scales are missing, or too many.
    """

    keys: Tensor
    values: Tensor
    position: Tensor
    state: dict[str, Tensor] = field(default_factory=dict)
    packed: Packed | None = None
    scales: Tensor | None = None
    capacity: int = field(init=False)
    dense: int = field(init=False)

    def __post_init__(self) -> None:
        self.capacity, self.dense = self.position.shape[-1], self.keys.shape[-2]
        if (self.keys.dtype == torch.int8) != (self.scales is not None):
            raise ValueError(f"scales belong to entries of int8 alone, and these are {self.keys.dtype}")

    @classmethod
    def empty(
        cls,
        layers: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        states: Sequence[State] = (),
        bits: int | None = None,
        packed: int = 0,
        dense: int | None = None,
    ) -> Self:
        """Fresh zeroed memory.

        Args:
            layers: L.
            kv_heads: H.
            capacity: entries that fit, C.
            head_dim: of keys and values.
            dtype: of keys and values, floating or int8; masses are float32, or float64 where it is.
            device: where the memory lies.
            states: which states there are.
            bits: for policies that quantise, how many bits they ask for.
            packed: quantised entries that fit; 0 makes a workspace for such a policy, in which nothing is
                quantised.
            dense: other entries that fit, D; by default `capacity`.

        Raises:
            ValueError: entries cannot be quantised so.
        """
        shapes = cls.shapes(layers, kv_heads, capacity, head_dim, dtype, bits, packed, dense)
        tensors = {name: torch.zeros(shape, dtype=kind, device=device) for name, kind, shape in shapes}
        position, wide = (
            tensors["position"],
            {torch.float32: torch.promote_types(_read_as(dtype), torch.float32)},
        )
        return cls(
            keys=tensors["keys"],
            values=tensors["values"],
            position=position,
            state={s.name: torch.zeros_like(position, dtype=wide.get(s.dtype, s.dtype)) for s in states},
            packed=None if bits is None else Packed.of(tensors),
            scales=tensors.get("scales"),
        )

    @staticmethod
    def shapes(
        layers: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        bits: int | None = None,
        packed: int = 0,
        dense: int | None = None,
    ) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, dtype and shape of each tensor that `empty` makes of these, those of `Packed` included; each
        state has the shape of `position` beside.

        Raises:
            ValueError: entries cannot be quantised so.
        """
        if packed and bits is None:
            raise ValueError(f"memory for {packed} quantised entries needs to know their bits")
        entries = (layers, kv_heads, capacity if dense is None else dense, head_dim)
        return [
            ("keys", dtype, entries),
            ("values", dtype, entries),
            ("position", torch.int32, (layers, kv_heads, capacity)),
            *([("scales", torch.float32, (layers, 2, *entries[1:-1]))] if dtype == torch.int8 else []),
            *([] if bits is None else Packed.shapes(layers, kv_heads, packed, head_dim, bits)),
        ]

    @property
    def dtype(self) -> torch.dtype:
        """In which entries are read unless asked otherwise: the memory's, float32 of such in eight bits."""
        return _read_as(self.keys.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        packed = () if self.packed is None else self.packed.tensors
        scales = () if self.scales is None else (self.scales,)
        tensors = (self.keys, self.values, self.position, *self.state.values(), *packed, *scales)
        return sum(tensor.nbytes for tensor in tensors)

    def map(self, view: Callable[[Tensor], Tensor]) -> Buffers:
        """The same memory with each tensor seen otherwise; nothing packed is in use."""
        state = {name: view(tensor) for name, tensor in self.state.items()}
        packed = None if self.packed is None else self.packed.map(view)
        scales = None if self.scales is None else view(self.scales)
        return Buffers(view(self.keys), view(self.values), view(self.position), state, packed, scales)

    def split(self, layers: int) -> Buffers:
        """Of memory of several sessions' layers, one session's behind the other's, that with a leading
        dimension of sessions."""
        return self.map(lambda tensor: tensor.unflatten(0, (len(tensor) // layers, layers)))

    def of_sessions(self, index: int | slice) -> Buffers:
        """Of memory of several sessions, that of one, or of some; nothing packed is in use."""
        return self.map(lambda tensor: tensor[index])

    def copy_from(self, source: Buffers, n: int, packed: int = 0) -> None:
        """Copy the first `n` entries of `source`, `packed` of which are packed there and will be here, and
        the states that both have.

        Raises:
            ValueError: they do not fit.
        """
        self.require(n, packed)
        dense = n - packed
        self.keys[:, :, :dense] = source.keys[:, :, :dense]
        self.values[:, :, :dense] = source.values[:, :, :dense]
        if self.scales is not None and source.scales is not None:
            self.scales[..., :dense] = source.scales[..., :dense]
        self.copy_records(source, n)
        if packed and self.packed is not None and source.packed is not None:
            self.packed.copy_from(source.packed, packed)

    def copy_records(self, source: Buffers, n: int) -> None:
        """Copy what there is beside the first `n` entries' keys and values: positions, states that both
        have, the key channels' ranges."""
        if self.packed is not None and source.packed is not None:
            self.packed.channels.copy_(source.packed.channels)
        self.position[:, :, :n] = source.position[:, :, :n]
        for name in self.state.keys() & source.state.keys():
            self.state[name][:, :, :n] = source.state[name][:, :, :n]

    def fits(self, n: int, packed: int = 0) -> bool:
        """Whether there is room for `n` entries, `packed` of them packed."""
        room = 0 if self.packed is None else self.packed.capacity
        return n <= self.capacity and packed <= room and n - packed <= self.dense

    def require(self, n: int, packed: int = 0) -> None:
        """Check that `n` entries fit, `packed` of them packed.

        Raises:
            ValueError: they do not.
        """
        if n > self.capacity:
            raise ValueError(f"{n} entries do not fit a capacity of {self.capacity}")
        if not self.fits(n, packed):
            raise ValueError(
                f"{packed} packed entries and {n - packed} others do not fit "
                f"{self.packed.capacity if self.packed else 0} and {self.dense}"
            )

    def begin(self, start: int, end: int, seen: int, states: Sequence[State]) -> None:
        """Note a session's entries `[start, end)`, whose first is its token number `seen`, and start their
        states."""
        position = self.position[:, :, start:end]
        position.copy_(torch.arange(seen, seen + end - start, dtype=position.dtype, device=position.device))
        for state in states:
            fresh = self.state[state.name][:, :, start:end]
            if state.kind == "vote":
                fresh.copy_(position)
            else:
                fresh.zero_()

    def begin_each(self, sessions: Tensor, starts: Tensor, seen: Tensor, states: Sequence[State]) -> None:
        """`begin` for one entry of each of some sessions: `starts` and `seen` are int64 `[B]`, as is which
        sessions' they are."""
        position = seen[:, None, None].to(self.position.dtype)
        self.position[sessions, :, :, starts] = position
        for state in states:
            memory = self.state[state.name]
            fresh = position if state.kind == "vote" else torch.zeros_like(position)
            memory[sessions, :, :, starts] = fresh.to(memory.dtype)

    def write(self, at: tuple[Index, ...], keys: Tensor, values: Tensor) -> None:
        """Write entries that are not packed to `keys[at]` and `values[at]`."""
        for number, (memory, new) in enumerate(((self.keys, keys), (self.values, values))):
            if self.scales is None:
                memory[at] = new.to(memory.dtype)
            else:
                memory[at], self.scales.select(-3, number)[at] = rounded(new)

    def dense_at(self, at: tuple[Index, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What `write` wrote there, in `dtype`: views where nothing is converted."""
        memories = (self.keys, self.values)
        if self.scales is None:
            keys, values = (memory[at].to(dtype) for memory in memories)
        else:
            keys, values = (
                widened(memory[at], scales[at], dtype)
                for memory, scales in zip(memories, self.scales.unbind(-3), strict=True)
            )
        return keys, values

    def turn(self, count: int, by: Tensor, rotary: Rotary, dtype: torch.dtype) -> None:
        """Rotate the first `count` keys that are not packed by so many positions, integer `[L, H, count]`,
        computing in `dtype`."""
        for layer, (keys, far) in enumerate(zip(self.keys, by, strict=True)):
            live = keys[:, :count]
            if self.scales is None:
                live.copy_(rotary.rotate(live.to(dtype), far))
            else:
                scales = self.scales[layer, 0, :, :count]
                turned = rounded(rotary.rotate(widened(live, scales, dtype), far))
                for memory, new in zip((live, scales), turned, strict=True):
                    memory.copy_(new)

    def value_norms(self, count: int, dtype: torch.dtype) -> Tensor:
        """The lengths of the first `count` values that are not packed, `[L, H, count]`, in `dtype`."""
        scales = None if self.scales is None else self.scales[:, 1, :, :count]
        return norms(self.values[:, :, :count], scales, dtype)

    def extend(self, layer: int, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write a session's entries from `start` on, and read all up to them; see `Cache.extend`.

        Where entries are quantised, these have to be a cache's `live` buffers.

        Args:
            layer: which.
            start: the entries before, those packed included.
            keys: rotated, `[H, n, head_dim]`.
            values: the same.

        Returns:
            Rotated keys and values of the first `start + n` entries, `[H, start + n, head_dim]`.
        """
        first = start - (self.packed.most if self.packed is not None else 0)
        last = first + keys.shape[-2]
        self.write((layer, slice(None), slice(first, last)), keys, values)
        return self.read(layer, start + keys.shape[-2])

    def read(
        self, layer: int | slice, n: int, dtype: torch.dtype | None = None, start: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Rotated keys and values of a session's entries `[start, n)`: `[..., H, n - start, head_dim]` of a
        layer, or of some, in `dtype`, by default the memory's. Where nothing is packed or converted they are
        views."""
        dtype = dtype or self.dtype
        packed = 0 if self.packed is None else self.packed.most
        dense = slice(max(0, start - packed), n - packed)
        keys, values = self.dense_at((layer, slice(None), dense), dtype)
        if self.packed is None or start >= packed:
            return keys, values
        wide = torch.promote_types(dtype, torch.float32)
        first_keys, first_values = self.packed.read(layer, self.position, wide, start)
        return torch.cat([first_keys.to(dtype), keys], -2), torch.cat([first_values.to(dtype), values], -2)

    def extend_each(
        self, layer: int, starts: Tensor, most: int, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`extend` for one entry of each of B sessions.

        Args:
            layer: which.
            starts: int64 `[B]`.
            most: the largest of `starts`, plus one.
            keys: rotated, `[B, H, head_dim]`.
            values: the same.

        Returns:
            `[B, H, most, head_dim]`; row b has `starts[b] + 1` entries, and anything beyond.
        """
        row = torch.arange(len(starts), device=starts.device)
        packed = None if self.packed is None or not self.packed.most else self.packed
        count = 0 if packed is None else packed.count
        self.write((row, layer, slice(None), starts - count), keys, values)
        all_of_it: Index = slice(None)
        reach = slice(None) if packed is not None else slice(most)
        all_keys, all_values = self.dense_at((all_of_it, layer, all_of_it, reach), self.dtype)
        if packed is None:
            return all_keys, all_values
        return packed.join(layer, self.position, most, all_keys, all_values)


def _read_as(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.int8 else dtype
