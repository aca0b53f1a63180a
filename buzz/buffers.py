"""The memory in which a session's entries lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from buzz.policy import State
from buzz.quant import Packed


@dataclass
class Buffers:
    """Memory for a session's entries, L layers of H KV heads: fresh tensors, or views into a pool's slot.

    Where there is packed memory, the first entries may lie there in few bits; entry i is then found at
    `keys[:, :, i - packed]`. A leading dimension of B sessions may come before all shapes.

    Attributes:
        keys: floating `[L, H, D, head_dim]`, rotated: the entries that are not packed.
        values: floating `[L, H, D, head_dim]`.
        position: int32 `[L, H, C]`, each entry's original token position.
        state: by name, `[L, H, C]`: what policies declared in `states`; others are not touched.
        packed: memory for quantised entries; required by policies that quantise.
    """

    keys: Tensor
    values: Tensor
    position: Tensor
    state: dict[str, Tensor] = field(default_factory=dict)
    packed: Packed | None = None

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
            dtype: of keys and values; masses are float32, or float64 where it is.
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
        position, wide = tensors["position"], {torch.float32: torch.promote_types(dtype, torch.float32)}
        return cls(
            keys=tensors["keys"],
            values=tensors["values"],
            position=position,
            state={s.name: torch.zeros_like(position, dtype=wide.get(s.dtype, s.dtype)) for s in states},
            packed=None if bits is None else Packed.of(tensors),
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
            *([] if bits is None else Packed.shapes(layers, kv_heads, packed, head_dim, bits)),
        ]

    @property
    def capacity(self) -> int:
        """Entries that fit."""
        return self.position.shape[-1]

    @property
    def dense(self) -> int:
        """Entries that fit unquantised."""
        return self.keys.shape[-2]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        packed = () if self.packed is None else self.packed.tensors
        tensors = (self.keys, self.values, self.position, *self.state.values(), *packed)
        return sum(tensor.nbytes for tensor in tensors)

    def map(self, view: Callable[[Tensor], Tensor]) -> Buffers:
        """The same memory with each tensor seen otherwise; nothing packed is in use."""
        state = {name: view(tensor) for name, tensor in self.state.items()}
        packed = None if self.packed is None else self.packed.map(view)
        return Buffers(view(self.keys), view(self.values), view(self.position), state, packed)

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
        self.keys[layer, :, first:last] = keys
        self.values[layer, :, first:last] = values
        return self.read(layer, start + keys.shape[-2])

    def read(
        self, layer: int | slice, n: int, dtype: torch.dtype | None = None, start: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Rotated keys and values of a session's entries `[start, n)`: `[..., H, n - start, head_dim]` of a
        layer, or of some, in `dtype`, by default the memory's. Where nothing is packed or converted they are
        views."""
        dtype = dtype or self.keys.dtype
        packed = 0 if self.packed is None else self.packed.most
        dense = slice(max(0, start - packed), n - packed)
        keys, values = (t[layer][..., dense, :].to(dtype) for t in (self.keys, self.values))
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
        all_keys, all_values = self.keys[:, layer], self.values[:, layer]
        all_keys[row, :, starts - count] = keys.to(all_keys.dtype)
        all_values[row, :, starts - count] = values.to(all_values.dtype)
        if packed is None:
            return all_keys[:, :, :most], all_values[:, :, :most]
        return packed.join(layer, self.position, most, all_keys, all_values)
