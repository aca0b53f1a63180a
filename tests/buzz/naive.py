"""A session restated as plainly as possible: loops, float64, unrotated keys.

Nothing here or in `rules.py` comes from the library, so that agreement means something.
"""

from __future__ import annotations

import cmath
import math
from dataclasses import dataclass, field

import numpy as np

from tests.buzz.kivi import Kivi
from tests.buzz.rules import RULES, Entry, Head, Settings


@dataclass
class Session:
    """Heads of [layer][kv_head], and what design section 2 says happens to them."""

    rule: str
    settings: Settings  # all that are the policy's own; of the bound that the pinned entries leave
    original: bool
    layers: int
    kv_heads: int
    group: int
    inv_freq: list[float]
    max_positions: int
    pinned: int = 0  # entries that the rule never sees
    bits: int | None = None
    residual: int = 0
    heads: list[list[Head]] = field(init=False)
    quantised: list[list[Kivi]] = field(init=False)
    seen: int = 0
    evicted: int = 0
    in_cache: bool = field(init=False)

    def __post_init__(self) -> None:
        self.heads = [[Head() for _ in range(self.kv_heads)] for _ in range(self.layers)]
        self.quantised = [
            [Kivi(self.bits, self.residual) for _ in layer] if self.bits else [] for layer in self.heads
        ]
        self.in_cache = not self.original

    @property
    def n(self) -> int:
        return self._same({len(head.entries) for layer in self.heads for head in layer})

    @property
    def sampled(self) -> int:
        return self._same({head.sampled for layer in self.heads for head in layer})

    @property
    def packed(self) -> int:
        return self._same({kivi.packed for layer in self.quantised for kivi in layer} or {0})

    @staticmethod
    def _same(values: set[int]) -> int:
        (value,) = values
        return value

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
        if not self.settings.get("accumulate", True):
            for layer in self.heads:
                for head in layer:
                    for entry in head.entries:
                        entry.score = 0.0

    def token(self, query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
        """One token: arrays [layer, heads, head_dim]; returns its attention, like query."""
        output = np.zeros_like(query)
        for layer in range(self.layers):
            for h in range(self.kv_heads):
                entries = self.heads[layer][h].entries
                entries.append(Entry(self.seen, key[layer, h], value[layer, h], mattered=[self.seen]))
                own = slice(h * self.group, (h + 1) * self.group)
                output[layer, own], weights = self.attend(query[layer, own], entries)
                mattered = (weights * len(entries) >= 1).any(axis=0)
                for entry, received, to_it in zip(entries, weights.sum(axis=0), mattered, strict=True):
                    entry.score = entry.score * self.decay + received
                    if to_it:
                        entry.mattered.append(self.seen)
        self.seen += 1
        return output

    @property
    def decay(self) -> float:
        if self.rule == "buzz2":
            horizon = self.settings["horizon"]
            return 1.0 if horizon is None else 1 - 1 / int(horizon)
        return 0.9999999 if self.rule == "cascade" else 1.0

    def attend(self, query: np.ndarray, entries: list[Entry]) -> tuple[np.ndarray, np.ndarray]:
        """The last entry's queries [group, head_dim]: their outputs, and weights [group, n]."""
        places = [index if self.in_cache else entry.position for index, entry in enumerate(entries)]
        keys = np.stack([self.turned(entry, place) for entry, place in zip(entries, places, strict=True)])
        turned = np.stack([self.rotate(q, places[-1]) for q in query])
        logits = turned @ keys.T / math.sqrt(query.shape[1])
        log_n = self.settings.get("log_n")
        if log_n is not None:
            logits *= max(1.0, math.log(len(entries)) / math.log(log_n))
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        return weights @ np.stack([entry.value for entry in entries]), weights

    def turned(self, entry: Entry, place: int) -> np.ndarray:
        if entry.turned is None or entry.turned[0] != place:
            entry.turned = (place, self.rotate(entry.key, place))
        return entry.turned[1]

    def end(self) -> None:
        before = self.n
        for layer in self.heads:
            for head in layer:
                pinned, head.entries = head.entries[: self.pinned], head.entries[self.pinned :]
                RULES[self.rule](head, self.seen, **self.settings)
                head.entries = pinned + head.entries
        for layer, quantised in zip(self.heads, self.quantised, strict=True):
            for head, kivi in zip(layer, quantised, strict=False):  # none, where nothing is quantised
                kivi.end(head, before - len(head.entries))
        self.evicted += before - self.n
