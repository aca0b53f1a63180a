"""The policies restated from their papers, as plainly as possible: loops, float64, unrotated keys.

Nothing here comes from the library, so that agreement means something.
"""

from __future__ import annotations

import cmath
import math
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Entry:
    position: int
    key: np.ndarray  # unrotated
    value: np.ndarray
    state: dict[str, float] = field(default_factory=lambda: {"score": 0.0})
    turned: tuple[int, np.ndarray] | None = None  # the key rotated to a position, to save time


@dataclass
class Rule:
    """A policy's settings, all of them, as plain values."""

    kind: str
    sink: int = 0
    window: int = 0
    threshold: int = 0
    stride: int = 0
    heavy: int = 0
    block: int = 0
    local_max: bool = True
    accumulate: bool = True
    log_n: int | None = None
    original: bool = False


@dataclass
class Session:
    """Entries of [layer][head], and what design section 2 says happens to them."""

    rule: Rule
    layers: int
    kv_heads: int
    group: int
    inv_freq: list[float]
    max_positions: int
    entries: list[list[list[Entry]]] = field(init=False)
    sampled: int = 0
    seen: int = 0
    evicted: int = 0
    in_cache: bool = field(init=False)

    def __post_init__(self) -> None:
        self.entries = [[[] for _ in range(self.kv_heads)] for _ in range(self.layers)]
        self.in_cache = not self.rule.original

    @property
    def n(self) -> int:
        return len(self.entries[0][0])

    def rotate(self, vector: np.ndarray, position: int) -> np.ndarray:
        half = len(self.inv_freq)
        out = vector.copy()
        for i, frequency in enumerate(self.inv_freq):
            turned = complex(vector[i], vector[i + half]) * cmath.exp(1j * position * frequency)
            out[i], out[i + half] = turned.real, turned.imag
        return out

    def begin(self, count: int) -> None:
        if self.seen + count > self.max_positions:
            self.in_cache = True
        if not self.rule.accumulate:
            for head in self.heads():
                for entry in head:
                    entry.state["score"] = 0.0

    def token(self, query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
        """One token: arrays [layer, heads, head_dim]; returns its attention, like query."""
        output = np.zeros_like(query)
        for layer in range(self.layers):
            for h in range(self.kv_heads):
                entries = self.entries[layer][h]
                entries.append(Entry(self.seen, key[layer, h], value[layer, h]))
                places = [index if self.in_cache else entry.position for index, entry in enumerate(entries)]
                keys = np.stack(
                    [self.turned(entry, place) for entry, place in zip(entries, places, strict=True)]
                )
                for g in range(self.group):
                    q = self.rotate(query[layer, h * self.group + g], places[-1])
                    logits = keys @ q / math.sqrt(len(q))
                    if self.rule.log_n is not None:
                        logits *= max(1.0, math.log(len(entries)) / math.log(self.rule.log_n))
                    weights = np.exp(logits - logits.max())
                    weights /= weights.sum()
                    output[layer, h * self.group + g] = weights @ np.stack([entry.value for entry in entries])
                    for entry, weight in zip(entries, weights.tolist(), strict=True):
                        entry.state["score"] += weight
        self.seen += 1
        return output

    def turned(self, entry: Entry, place: int) -> np.ndarray:
        if entry.turned is None or entry.turned[0] != place:
            entry.turned = (place, self.rotate(entry.key, place))
        return entry.turned[1]

    def end(self) -> None:
        before = self.n
        while self.due():
            sampled = self.sampled
            for layer in self.entries:
                for h in range(self.kv_heads):
                    layer[h], sampled = self.compact(layer[h])
            self.sampled = sampled
        self.evicted += before - self.n

    def heads(self) -> list[list[Entry]]:
        return [head for layer in self.entries for head in layer]

    def due(self) -> bool:
        rule = self.rule
        if rule.kind == "buzz":
            return self.n - rule.sink - rule.window > rule.threshold
        if rule.kind == "streaming":
            return self.n > rule.sink + rule.window
        if rule.kind == "h2o":
            return self.n > rule.heavy + rule.window
        return False

    def compact(self, entries: list[Entry]) -> tuple[list[Entry], int]:
        rule = self.rule
        if rule.kind == "streaming":
            kept = list(entries)
            while len(kept) > rule.sink + rule.window + 1 - rule.block:
                del kept[rule.sink]
            return kept, 0
        last = len(entries) - rule.window
        if rule.kind == "h2o":
            kept = list(entries[:last])
            while len(kept) > rule.heavy + 1 - rule.block:
                lowest = min(entry.state["score"] for entry in kept)
                del kept[max(i for i, entry in enumerate(kept) if entry.state["score"] == lowest)]
            return kept + entries[last:], 0
        sinks, middle, window = entries[: rule.sink], entries[rule.sink : last], entries[last:]
        old = [entry for i, entry in enumerate(middle[: self.sampled]) if i % ((rule.stride + 1) // 2) == 0]
        new = []
        cell: list[Entry] = []
        fresh = middle[self.sampled :]
        for i, entry in enumerate(fresh):
            cell.append(entry)
            if len(cell) == rule.stride or i == len(fresh) - 1:
                best = cell[0]
                for other in cell[1:]:
                    if rule.local_max and other.state["score"] > best.state["score"]:
                        best = other
                new.append(best)
                cell = []
        for entry in sinks + old:
            entry.state["score"] = 0.0
        return sinks + old + new + window, len(old) + len(new)
