"""Moving a session's entries: to other memory, to fewer bits, or together where others were evicted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from buzz.buffers import Buffers
from buzz.merging import merged
from buzz.policy import Compaction
from buzz.rotary import Rotary


@dataclass(frozen=True, kw_only=True)
class Move:
    """Where a session's entries are, and where they go.

    One layer is moved at a time, so that temporary memory stays a layer's.

    Attributes:
        source: where they are: a cache's `live` buffers.
        target: where they go: the same memory, or some that does not overlap it and has room for them.
        n: how many they are.
        before: how many of them are packed.
        after: how many of those that stay will be packed: the first ones.
        outcome: which of them stay, and with which states; None: all, as they are.
        measured: whether the ranges of the key channels are known; if not, they become those of these keys.
        rotary: the model's rotary embedding.
        in_cache: whether keys are rotated to in-cache indices (else to original positions).
        dtype: in which keys and values are moved.
    """

    source: Buffers
    target: Buffers
    n: int
    before: int
    after: int
    outcome: Compaction | None
    measured: bool
    rotary: Rotary
    in_cache: bool
    dtype: torch.dtype

    def run(self) -> None:
        """Write the entries, their positions and their states to the target."""
        source, target, outcome = self.source, self.target, self.outcome
        elsewhere = target.keys is not source.keys
        stays = outcome is None and self.after >= self.before and target.fits(self.n, self.before)
        if elsewhere and stays:
            target.copy_from(source, self.n, self.before)
        elif elsewhere:
            target.copy_records(source, self.n if outcome is None else 0)
        layers = range(len(target.keys))
        if outcome is not None and outcome.merge is None and not (self.before or self.after):
            self._keep(outcome.index)
        elif not stays:
            for layer in layers:
                self._write(layer, 0, *self._survivors(layer))
        elif self.after > self.before:
            for layer in layers:
                self._write(layer, self.before, *self._unpacked(layer))
        if outcome is not None:
            for name, kept in outcome.state.items():
                target.state[name][:, :, : outcome.index.shape[-1]] = kept

    def _keep(self, index: Tensor) -> None:
        """Move survivors of which none is or will be packed."""
        source, target, count = self.source, self.target, index.shape[-1]
        keep(source.keys, target.keys, index)
        keep(source.values, target.values, index)
        keep(source.position.unsqueeze(-1), target.position.unsqueeze(-1), index)
        if not self.in_cache:
            return
        place = torch.arange(count, device=index.device)
        for keys, past in zip(target.keys, index, strict=True):
            live = keys[:, :count]
            live.copy_(self.rotary.rotate(live.to(self.dtype), place - past))

    def _unpacked(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of the keys and values that are not packed, and where the keys are."""
        target, dense = self.target, slice(0, self.n - self.before)
        keys, values = (t[layer, :, dense].to(self.dtype, copy=True) for t in (target.keys, target.values))
        return keys, values, self._places(target.position[layer, :, : self.n])[..., self.before :]

    def _survivors(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """All keys at their new positions and values, and where the keys are; writes original positions."""
        keys, values = self.source.read(layer, self.n, self.dtype)
        position = self.source.position[layer, :, : self.n]
        place = self._places(position)
        if self.outcome is None:
            return keys, values, place
        index = self.outcome.index[layer]
        if self.outcome.merge is None:
            keys, values = _select(keys, index), _select(values, index)
        else:
            merge = self.outcome.merge[layer]
            keys, values = merged(keys, values, place.expand_as(merge), index, merge, self.rotary)
        position = position.gather(-1, index)
        self.target.position[layer, :, : index.shape[-1]] = position
        place = self._places(position)
        return self.rotary.rotate(keys, place - index) if self.in_cache else keys, values, place

    def _write(self, layer: int, start: int, keys: Tensor, values: Tensor, place: Tensor) -> None:
        """Write entries from `start` on, which are rotated to `place`."""
        target, count, all_of_them = self.target, self.after - start, keys.shape[-2]
        if target.packed is not None and count:
            if not self.measured:
                target.packed.measure(layer, self.rotary.rotate(keys, -place))
            unrotated = self.rotary.rotate(keys[:, :count], -place[..., :count])
            target.packed.write(layer, start, unrotated, values[:, :count])
        target.keys[layer, :, : all_of_them - count] = keys[:, count:]
        target.values[layer, :, : all_of_them - count] = values[:, count:]

    def _places(self, position: Tensor) -> Tensor:
        """The positions to which the keys of entries `[H, n]` at these original ones are rotated."""
        if not self.in_cache:
            return position.long()
        return torch.arange(position.shape[-1], device=position.device)


def _select(entries: Tensor, index: Tensor) -> Tensor:
    """Of `[H, n, ...]` the entries `index` `[H, m]`; head by head, since that is twice as fast."""
    selected = entries.new_empty(*index.shape, *entries.shape[2:])
    for head, kept, into in zip(entries, index, selected, strict=True):
        torch.index_select(head, 0, kept, out=into)
    return selected


def _keep(source: Tensor, target: Tensor, index: Tensor) -> None:
    for entries, kept, into in zip(source, index, target, strict=True):
        into[:, : kept.shape[-1]] = _select(entries, kept)


_operators = torch.library.Library("buzz", "DEF")
_operators.define("keep(Tensor source, Tensor(a!) target, Tensor index) -> ()")
_operators.impl("keep", _keep, "CompositeExplicitAutograd")


def keep(source: Tensor, target: Tensor, index: Tensor) -> None:
    """Write the entries that stay to the front of the target: an operator, `buzz::keep`, for which a backend
    may register a kernel of its own.

    Args:
        source: `[L, H, n, ...]`, the entries of a head one behind the other.
        target: the same but for n: the same memory, or some that does not overlap it.
        index: int64 `[L, H, m]`, ascending.
    """
    torch.ops.buzz.keep(source, target, index)
