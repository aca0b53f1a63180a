"""Snapshots in few bits: quantised as policies with `kivi` do it (see `buzz.quant`), but for the entries that
came last. What comes back is near to what was, not equal.

A compressed snapshot is one of the same cache as if it lay in a slot for quantised entries, and is checked as
such; positions and states are exact. Caches whose policy quantises stay as they are: what they have in full
came last as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from apiary_server.errors import SnapshotRefused
from apiary_server.sessions.info import RebuildReason
from apiary_server.sessions.pool import SlotLayout
from buzz import CacheState, Rotary
from buzz.quant import BLOCK, GROUP, Packed

Bits = Literal[2, 4]  # of `buzz.quant`
RESIDUAL = 128  # entries that stay in full


@dataclass(frozen=True, slots=True)
class Compression:
    """To how many bits caches are quantised, and how the model rotates their keys."""

    bits: Bits
    rotary: Rotary

    def helps(self, layout: SlotLayout, state: CacheState) -> bool:
        """Whether a cache in such a slot has enough entries, and none in few bits, eight included."""
        return _in_full(layout) and state.n >= RESIDUAL + BLOCK

    def compress(
        self, state: CacheState, tensors: Mapping[str, Tensor]
    ) -> tuple[CacheState, dict[str, Tensor]]:
        """A cache with its first entries in few bits, from one that this helps.

        Args:
            state: of the cache.
            tensors: what is in use of its slot, in host memory.
        """
        keys, values, position = (tensors[name] for name in ("keys", "values", "position"))
        layers, heads, n, head_dim = keys.shape
        count, wide = n - RESIDUAL, torch.promote_types(keys.dtype, torch.float32)
        shapes = Packed.shapes(layers, heads, count, head_dim, self.bits)
        few = {name: torch.empty(shape, dtype=dtype) for name, dtype, shape in shapes}
        packed = Packed.of(few)
        for layer in range(layers):
            place = torch.arange(n) if state.rotated_in_cache else position[layer]
            unrotated = self.rotary.rotate(keys[layer, :, :count].to(wide), -place[..., :count])
            packed.measure(layer, unrotated)
            packed.write(layer, 0, unrotated, values[layer, :, :count].to(wide))
        last = {"keys": keys[:, :, count:], "values": values[:, :, count:]}
        return replace(state, packed=count, measured=True), {**tensors, **last, **few}


def _in_full(layout: SlotLayout) -> bool:
    return layout.bits is None and layout.geometry.dtype != torch.int8


def compressed(layout: SlotLayout, state: CacheState, bits: Bits) -> SlotLayout:
    """The slot that a cache with this state would lie in, were one of such a slot compressed.

    Raises:
        SnapshotRefused: it would not be.
    """
    if not _in_full(layout) or layout.geometry.head_dim % GROUP or state.n <= RESIDUAL:
        raise SnapshotRefused(f"{state} is never compressed", RebuildReason.SNAPSHOT_CORRUPT)
    return replace(layout, bits=bits, packed=state.n - RESIDUAL, dense=RESIDUAL)


def expand(
    state: CacheState, tensors: Mapping[str, Tensor], rotary: Rotary
) -> tuple[CacheState, dict[str, Tensor]]:
    """A cache with all its entries in full, from what `Compression.compress` returned.

    Args:
        state: of the compressed cache.
        tensors: its, which fit the slot that `compressed` tells.
        rotary: the model's.
    """
    last, position, count = (tensors["keys"], tensors["values"]), tensors["position"], state.packed
    packed = Packed.of(tensors).using(count, count, rotary, state.rotated_in_cache)
    wide = torch.promote_types(last[0].dtype, torch.float32)
    layers, heads, dense, head_dim = last[0].shape
    whole = [torch.empty(layers, heads, count + dense, head_dim, dtype=each.dtype) for each in last]
    for layer in range(layers):
        for entries, first, behind in zip(whole, packed.read(layer, position, wide), last, strict=True):
            entries[layer, :, :count], entries[layer, :, count:] = first, behind[layer]
    in_full = {name: tensor for name, tensor in tensors.items() if name in ("position", "state")}
    state = replace(state, packed=0, measured=False)
    return state, {"keys": whole[0], "values": whole[1], **in_full}
