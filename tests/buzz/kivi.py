"""Quantisation restated: what lies in few bits, once the segment has ended, of one head's entries."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tests.buzz.rules import Entry, Head

GROUP = BLOCK = 32  # channels that share a minimum and a step; entries that are quantised at a time, at least


@dataclass
class Kivi:
    bits: int
    residual: int
    packed: int = 0
    ranges: list[tuple[float, float]] = field(default_factory=list)  # of each key channel: centre, half range

    def end(self, head: Head, evicted: int) -> None:
        self.packed = max(0, self.packed - evicted)
        if len(head.entries) - self.packed >= self.residual + BLOCK:
            self.packed = len(head.entries) - self.residual
        first = head.entries[: self.packed]
        if first and not self.ranges:
            keys = np.stack([entry.key for entry in head.entries])
            for low, high in zip(keys.min(axis=0), keys.max(axis=0), strict=True):
                self.ranges.append((half((low + high) / 2), half(max((high - low) / 2, 2**-10))))
        for entry in first:
            if not entry.quantised:
                self.quantise(entry)

    def quantise(self, entry: Entry) -> None:
        centre, reach = np.array(self.ranges).T
        entry.key = self.nearest((entry.key - centre) / reach) * reach + centre
        entry.value = self.nearest(entry.value)
        entry.quantised, entry.turned = True, None

    def nearest(self, vector: np.ndarray) -> np.ndarray:
        out = np.zeros_like(vector)
        most = 2**self.bits - 1
        for start in range(0, len(vector), GROUP):
            group = vector[start : start + GROUP]
            low = half(group.min())
            step = half((group.max() - low) / most)
            for i, x in enumerate(group.tolist()):
                out[start + i] = low + step * min(max(round((x - low) / step), 0), most)
        return out


def half(x: float) -> float:
    return float(np.float16(x))
