"""Moving a session's entries: to other memory, to fewer bits, or together where others were evicted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from buzz import operators
from buzz.buffers import Buffers
from buzz.merging import merged
from buzz.policy import Compaction
from buzz.rotary import Rotary

_TOGETHER = 4096  # entries of a head, in all layers that are moved at once


@dataclass(frozen=True, kw_only=True)
class Move:
    """Where a session's entries are, and where they go.

    A few layers are moved at a time, so that temporary memory stays small.

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
        if outcome is not None and outcome.merge is None and not (self.before or self.after):
            self._keep(outcome.index)
        elif not stays:
            codes = self._codes()
            for some in layers(len(target.keys), self.n - codes):
                survivors = self._survivors(some, codes)
                self._keep_codes(some, codes)
                self._write(some, codes, *survivors)
        elif self.after > self.before:
            for some in layers(len(target.keys), self.n - self.before):
                self._write(some, self.before, *self._unpacked(some))
        if outcome is not None:
            for name, kept in outcome.state.items():
                target.state[name][:, :, : outcome.index.shape[-1]] = kept

    def _keep(self, index: Tensor) -> None:
        """Move survivors of which none is or will be packed."""
        source, target, count = self.source, self.target, index.shape[-1]
        keep(source.keys, target.keys, index)
        keep(source.values, target.values, index)
        keep(source.position.unsqueeze(-1), target.position.unsqueeze(-1), index)
        if source.scales is not None and target.scales is not None:
            for scales, into in zip(source.scales.unbind(1), target.scales.unbind(1), strict=True):
                keep(scales.unsqueeze(-1), into.unsqueeze(-1), index)
        if self.in_cache:
            target.turn(count, torch.arange(count, device=index.device) - index, self.rotary, self.dtype)

    def _unpacked(self, some: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of the keys and values that are not packed, and where the keys are."""
        target, dense = self.target, slice(0, self.n - self.before)
        keys, values = (t.clone() for t in target.dense_at((some, slice(None), dense), self.dtype))
        return keys, values, self._places(target.position[some, :, : self.n])[..., self.before :]

    def _codes(self) -> int:
        """How many survivors of every head, the first ones, keep their codes: they are and stay packed."""
        if self.outcome is None or self.outcome.merge is not None or not (self.before and self.after):
            return 0
        packed = (self.outcome.index < self.before).sum(dim=-1)
        return min(self.after, _least(packed))

    def _keep_codes(self, some: slice, count: int) -> None:
        """Move the codes of the first survivors, without a look at what they mean."""
        source, target = self.source.packed, self.target.packed
        if source is None or target is None or self.outcome is None or not count:
            return
        index = self.outcome.index[some, :, :count]
        for codes, into in zip(source.entries, target.entries, strict=True):
            keep(_entries(codes[some]), _entries(into[some]), index)

    def _survivors(self, some: slice, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys at their new positions and values of the survivors from `start` on, and where the keys are;
        writes the original positions of all."""
        position = self.source.position[some, :, : self.n]
        if self.outcome is None:
            return *self.source.read(some, self.n, self.dtype), self._places(position)
        index = self.outcome.index[some]
        kept = index[..., start:]
        if self.outcome.merge is None:
            first = _least(kept) if kept.numel() else self.n
            keys, values = self.source.read(some, self.n, self.dtype, first)
            keys, values = _select(keys, kept - first), _select(values, kept - first)
        else:
            merge = self.outcome.merge[some]
            keys, values = self.source.read(some, self.n, self.dtype)
            place = self._places(position).expand_as(merge)
            keys, values = merged(keys, values, place, index, merge, self.rotary)
        position = position.gather(-1, index)
        self.target.position[some, :, : index.shape[-1]] = position
        place = self._places(position)[..., start:]
        return self.rotary.rotate(keys, place - kept) if self.in_cache else keys, values, place

    def _write(self, some: slice, start: int, keys: Tensor, values: Tensor, place: Tensor) -> None:
        """Write entries from `start` on, which are rotated to `place`."""
        target, count, all_of_them = self.target, self.after - start, keys.shape[-2]
        if target.packed is not None and count:
            if not self.measured:
                target.packed.measure(some, self.rotary.rotate(keys, -place))
            unrotated = self.rotary.rotate(keys[..., :count, :], -place[..., :count])
            target.packed.write(some, start, unrotated, values[..., :count, :])
        dense = (some, slice(None), slice(all_of_them - count))
        target.write(dense, keys[..., count:, :], values[..., count:, :])

    def _places(self, position: Tensor) -> Tensor:
        """The positions to which the keys of entries `[H, n]` at these original ones are rotated."""
        if not self.in_cache:
            return position.long()
        return torch.arange(position.shape[-1], device=position.device)


def layers(count: int, entries: int) -> Iterator[slice]:
    """Of so many layers those that are worked on together: more, the fewer entries each head has."""
    step = max(1, _TOGETHER // max(1, entries))
    return (slice(first, min(first + step, count)) for first in range(0, count, step))


def _least(numbers: Tensor) -> int:
    return int(numbers.min())


def _entries(tensor: Tensor) -> Tensor:
    return tensor.view(*tensor.shape[:3], -1)


def _select(entries: Tensor, index: Tensor) -> Tensor:
    """Of `[L, H, n, ...]` the entries `index` `[L, H, m]`."""
    selected = entries.new_empty(*index.shape, *entries.shape[3:])
    keep(entries, selected, index)
    return selected


def _keep(source: Tensor, target: Tensor, index: Tensor) -> None:
    """Head by head, since that is twice as fast; through other memory, since the target may be the source."""
    count = index.shape[-1]
    for entries, kept, into in zip(*map(_heads, (source, index, target)), strict=True):
        into[:count] = torch.index_select(entries, 0, kept)


def _heads(tensor: Tensor) -> Iterator[Tensor]:
    return (head for layer in tensor for head in layer)


operators.define("buzz::keep(Tensor source, Tensor(a!) target, Tensor index) -> ()", _keep)


def keep(source: Tensor, target: Tensor, index: Tensor) -> None:
    """Write the entries that stay to the front of the target: the operator `buzz::keep`.

    Args:
        source: `[L, H, n, ...]`, the entries of a head one behind the other.
        target: the same but for n: the same memory, or some that does not overlap it.
        index: int64 `[L, H, m]`, ascending.
    """
    torch.ops.buzz.keep(source, target, index)
