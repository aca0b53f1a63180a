"""KV quantisation to 2 or 4 bits, after KIVI (https://arxiv.org/abs/2402.02750).

Values are quantised as in the paper: per token, in groups of `GROUP` channels, each with a minimum and a
step of its own (asymmetric, float16). Keys have channels that are far larger than others; the paper groups
them per channel over 32 tokens. But evictions regroup the tokens, and each new grouping rounds anew. So here
each key channel is scaled to [-1, 1] by the range that it had when the session's first entries were
quantised, and then keys are quantised like values. An entry's codes so depend on nothing but itself, and
reading and quantising again gives the same codes. Keys lie unrotated, and are rotated when they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from buzz.rotary import Rotary

BITS = (2, 4)
GROUP = 32  # channels that share a minimum and a step
BLOCK = 32  # entries that are quantised at a time while decoding

_TENSORS = ("key_codes", "value_codes", "key_grid", "value_grid", "channels")
_FLAT = 2.0**-10  # the least range of a key channel, should it have been constant
_LARGEST = torch.finfo(torch.float16).max


def pack(entries: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Quantise.

    Args:
        entries: floating `[..., head_dim]`, at least float32; head_dim a multiple of `GROUP`.
        bits: 2 or 4.

    Returns:
        Codes, uint8 `[..., head_dim * bits / 8]`, and the minimum and step of each group, float16
        `[..., head_dim / GROUP, 2]`.
    """
    groups = entries.unflatten(-1, (-1, GROUP))
    levels = 2**bits - 1
    low = groups.amin(dim=-1).clamp(-_LARGEST, _LARGEST).half()
    step = ((groups.amax(dim=-1) - low) / levels).clamp(0, _LARGEST).half()
    wide_low, wide_step = (t.to(entries.dtype).unsqueeze(-1) for t in (low, step))
    codes = ((groups - wide_low) / wide_step).nan_to_num(0).round_().clamp_(0, levels)  # a step may be 0
    planes = codes.flatten(-2).to(torch.uint8).unflatten(-1, (8 // bits, -1)).unbind(dim=-2)
    packed = planes[0].clone()
    for i, plane in enumerate(planes[1:], 1):
        packed |= plane << i * bits
    return packed, torch.stack([low, step], dim=-1)


def unpack(codes: Tensor, grid: Tensor, dtype: torch.dtype) -> Tensor:
    """What `pack` made of entries: `[..., head_dim]` in `dtype`, which should be at least float32."""
    bits = codes.shape[-1] * 8 // (grid.shape[-2] * GROUP)
    # a byte holds channels that are far apart, so that each bit position is one run of channels
    planes = codes.new_empty(*codes.shape[:-1], 8 // bits, codes.shape[-1], dtype=dtype)
    for i, shift in enumerate(range(0, 8, bits)):
        planes[..., i, :] = codes >> shift & 2**bits - 1
    levels: Tensor = planes.flatten(-2).unflatten(-1, (-1, GROUP))
    low, step = grid.to(dtype).unsqueeze(-2).unbind(dim=-1)
    levels.mul_(step).add_(low)  # in place: memory traffic is what it costs
    return levels.flatten(-2)


@dataclass(frozen=True)
class Packed:
    """Memory for the first entries of each layer and head in few bits, and how much of it is in use.

    A leading dimension of B sessions may come before all shapes.

    Attributes:
        key_codes: uint8 `[L, H, P, head_dim * bits / 8]`, unrotated.
        value_codes: the same.
        key_grid: float16 `[L, H, P, head_dim / GROUP, 2]`: minimum and step of each group.
        value_grid: the same.
        channels: float16 `[L, H, 2, head_dim]`: centre and half range of each key channel.
        count: entries in use, of one session or int64 `[B]`.
        most: the largest count.
        rotary: rotates keys that are read; None where nothing is in use.
        in_cache: whether to in-cache indices, else to their original positions; of one session or bool `[B]`.
    """

    key_codes: Tensor
    value_codes: Tensor
    key_grid: Tensor
    value_grid: Tensor
    channels: Tensor
    count: int | Tensor = 0
    most: int = 0
    rotary: Rotary | None = None
    in_cache: bool | Tensor = True

    @classmethod
    def empty(
        cls, layers: int, kv_heads: int, capacity: int, head_dim: int, bits: int, device: torch.device | str
    ) -> Self:
        """Fresh zeroed memory for `capacity` entries; 0 has the key channels' ranges alone.

        Raises:
            ValueError: `bits` is not 2 or 4, or entries of that head_dim cannot be grouped.
        """
        shapes = cls.shapes(layers, kv_heads, capacity, head_dim, bits)
        return cls.of({name: torch.zeros(shape, dtype=dtype, device=device) for name, dtype, shape in shapes})

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The memory that these tensors are, which have the names and dtypes of `shapes`."""
        return cls(*(tensors[name] for name in _TENSORS))  # type: ignore[arg-type]

    @staticmethod
    def shapes(
        layers: int, kv_heads: int, capacity: int, head_dim: int, bits: int
    ) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, dtype and shape of each tensor.

        Raises:
            ValueError: `bits` is not 2 or 4, or entries of that head_dim cannot be grouped.
        """
        if bits not in BITS or (capacity and head_dim % GROUP):
            raise ValueError(
                f"entries are quantised to 2 or 4 bits in groups of {GROUP} channels; "
                f"{bits} bits and a head_dim of {head_dim} are not possible"
            )
        codes = (layers, kv_heads, capacity, head_dim * bits // 8)
        grid = (layers, kv_heads, capacity, head_dim // GROUP, 2)
        return [
            ("key_codes", torch.uint8, codes),
            ("value_codes", torch.uint8, codes),
            ("key_grid", torch.float16, grid),
            ("value_grid", torch.float16, grid),
            ("channels", torch.float16, (layers, kv_heads, 2, head_dim)),
        ]

    @property
    def capacity(self) -> int:
        """Entries that fit."""
        return self.key_codes.shape[-2]

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.key_codes.shape[-1] * 8 // self.channels.shape[-1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All the memory."""
        return tuple(getattr(self, name) for name in _TENSORS)

    def map(self, view: Callable[[Tensor], Tensor]) -> Self:
        """The same memory with each tensor seen otherwise; nothing is in use."""
        return self.of({name: view(getattr(self, name)) for name in _TENSORS})

    def of_sessions(self, index: int | slice) -> Self:
        """Of memory of several sessions, that of one, or of some."""
        return self.map(lambda tensor: tensor[index])

    def using(self, count: int | Tensor, most: int, rotary: Rotary | None, in_cache: bool | Tensor) -> Self:
        """The same memory with other entries in use."""
        return replace(self, count=count, most=most, rotary=rotary, in_cache=in_cache)

    @property
    def entries(self) -> tuple[Tensor, ...]:
        """What each entry has of the memory: codes and grids."""
        return self.tensors[:-1]

    def copy_from(self, source: Packed, count: int) -> None:
        """Copy the first `count` entries."""
        for mine, theirs in zip(self.entries, source.entries, strict=True):
            mine[:, :, :count] = theirs[:, :, :count]

    def measure(self, layer: int | slice, keys: Tensor) -> None:
        """Set the channel ranges of a layer, or of some, to those of unrotated keys `[..., H, n, dim]`."""
        least, most = keys.amin(dim=-2), keys.amax(dim=-2)
        ranges = torch.stack([(least + most) / 2, ((most - least) / 2).clamp(min=_FLAT)], dim=-2)
        self.channels[layer] = ranges.clamp(-_LARGEST, _LARGEST)

    def write(self, layer: int | slice, start: int, keys: Tensor, values: Tensor) -> None:
        """Quantise unrotated keys and values `[..., H, n, head_dim]` of a layer, or of some, as entries
        `[start, start + n)`."""
        centre, half = self.channels[layer].to(keys.dtype).unsqueeze(-2).unbind(dim=-3)
        place = slice(start, start + keys.shape[-2])
        scaled = (keys - centre) / half
        self.key_codes[layer, :, place], self.key_grid[layer, :, place] = pack(scaled, self.bits)
        self.value_codes[layer, :, place], self.value_grid[layer, :, place] = pack(values, self.bits)

    def read(
        self, layer: int | slice, position: Tensor, dtype: torch.dtype, start: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Keys, rotated, and values of entries `[start, most)` of a layer, or of some, in `dtype`: `[..., H,
        most - start, head_dim]`.

        Of a session that has fewer in use, the others are finite and mean nothing.

        Args:
            layer: which.
            position: integer `[..., L, H, n]`, n at least `most`: the entries' original positions.
            dtype: at least float32.
            start: the first of the entries.
        """
        if self.rotary is None:
            raise ValueError("nothing is packed here")
        at = self._at(layer)
        keys, channels = self._unpacked(self.key_codes, self.key_grid, layer, dtype, start), self.channels[at]
        if isinstance(self.count, Tensor):  # as with grids
            channels = channels.where((self.count > 0).view(-1, 1, 1, 1), 0)
        centre, half = channels.to(dtype).unsqueeze(-2).unbind(dim=-3)
        place = position[*at, :, start : self.most]
        if self.in_cache is not False:
            index = torch.arange(start, self.most, device=position.device)
            place = index if self.in_cache is True else index.where(self.in_cache.view(-1, 1, 1), place)
        return self.rotary.rotate(keys.mul_(half).add_(centre), place), self.values(layer, dtype, start)

    def values(self, layer: int | slice, dtype: torch.dtype, start: int = 0) -> Tensor:
        """As `read`, without the keys."""
        return self._unpacked(self.value_codes, self.value_grid, layer, dtype, start)

    def _unpacked(
        self, codes: Tensor, grid: Tensor, layer: int | slice, dtype: torch.dtype, start: int
    ) -> Tensor:
        at = self._at(layer)
        codes, grid = (tensor[*at, :, start : self.most] for tensor in (codes, grid))
        if isinstance(self.count, Tensor):  # beyond it there may be anything, NaN included
            live = torch.arange(start, self.most, device=grid.device) < self.count.unsqueeze(-1)
            grid = grid.where(live[:, None, :, None, None], 0)
        return unpack(codes, grid, dtype)

    def _at(self, layer: int | slice) -> tuple[int | slice, ...]:
        """Where a layer, or some, are in the memory of one session or of several."""
        return (slice(None), layer) if isinstance(self.count, Tensor) else (layer,)

    def join(
        self, layer: int, position: Tensor, most: int, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The packed entries of B sessions and behind them, row by row, those that are not.

        Args:
            layer: which.
            position: integer `[B, L, H, n]`.
            most: entries of the longest session.
            keys: rotated, `[B, H, D, head_dim]`: the entries that are not packed.
            values: the same.

        Returns:
            `[B, H, most, head_dim]` in the keys' dtype; beyond a session's entries there may be anything.
        """
        batch, _, dense, _ = keys.shape
        row = torch.arange(batch, device=keys.device).unsqueeze(-1)
        # a session with few packed entries may have more of the others than fit behind; those are garbage
        behind = torch.arange(min(dense, most), device=keys.device)
        place = torch.as_tensor(self.count, device=keys.device).unsqueeze(-1) + behind
        joined = []
        wide = torch.promote_types(keys.dtype, torch.float32)
        for packed, others in zip(self.read(layer, position, wide), (keys, values), strict=True):
            whole = others.new_empty(*others.shape[:2], self.most + len(behind), others.shape[-1])
            whole[:, :, : self.most] = packed
            whole[row, :, place] = others[:, :, : len(behind)].transpose(1, 2)
            joined.append(whole[:, :, :most])
        return joined[0], joined[1]
