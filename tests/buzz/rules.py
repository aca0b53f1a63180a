"""The policies restated from their papers: what each does to one head's entries when a segment ends.

A rule takes the head, the tokens seen, and all the settings of its policy by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(eq=False)
class Entry:
    position: int
    key: np.ndarray  # unrotated
    value: np.ndarray
    score: float = 0.0
    mattered: list[int] = field(default_factory=list)  # the tokens to whose queries it mattered; its own, too
    quantised: bool = False
    turned: tuple[int, np.ndarray] | None = None  # the key rotated to a position, to save time


@dataclass
class Head:
    entries: list[Entry] = field(default_factory=list)
    sampled: int = 0
    buffers: list[list[Entry]] = field(default_factory=list)  # a cascade's, after the first
    offers: list[int] = field(default_factory=list)  # made to each of them


Settings = dict[str, Any]


def full(head: Head, seen: int, bound: int) -> None:
    assert len(head.entries) <= bound


def window(head: Head, seen: int, window: int, block: int) -> None:
    streaming(head, seen, 0, window, block)


def streaming(head: Head, seen: int, sink: int, window: int, block: int) -> None:
    if len(head.entries) > sink + window:
        while len(head.entries) > sink + window + 1 - block:
            del head.entries[sink]


def h2o(head: Head, seen: int, heavy: int, recent: int, block: int) -> None:
    if len(head.entries) > heavy + recent:
        older = len(head.entries) - recent
        kept = best(head.entries[:older], heavy + 1 - block)
        head.entries = kept + head.entries[older:]


def best(entries: list[Entry], count: int) -> list[Entry]:
    """The `count` with the largest score, in order: the last of the lowest goes, again and again."""
    kept = list(entries)
    while len(kept) > count:
        lowest = min(entry.score for entry in kept)
        del kept[max(i for i, entry in enumerate(kept) if entry.score == lowest)]
    return kept


def buzz2(
    head: Head,
    seen: int,
    sink: int,
    window: int,
    hot: int,
    cells: int,
    horizon: int | None,
    mean: bool,
    values: bool,
    block: int,
) -> None:
    if len(head.entries) <= sink + window + hot + cells:
        return
    end = len(head.entries) - window
    middle = head.entries[sink:end]

    def importance(entry: Entry) -> float:
        decay = 1.0 if horizon is None else 1 - 1 / horizon
        queries = sum(decay**ago for ago in range(seen - entry.position)) if mean else 1.0
        return entry.score / queries * (float(entry.value @ entry.value) if values else 1.0)

    def foremost(entries: list[Entry]) -> Entry:
        return max(entries, key=importance)  # the first of equals

    places = hot + cells + 1 - block
    hottest: list[Entry] = []
    while len(hottest) < hot * places // (hot + cells):
        hottest.append(foremost([entry for entry in middle if entry not in hottest]))
    others = [entry for entry in middle if entry not in hottest]
    count = places - len(hottest)
    cut = [others[len(others) * i // count : len(others) * (i + 1) // count] for i in range(count)]
    kept = hottest + [foremost(cell) for cell in cut]
    head.entries = head.entries[:sink] + [e for e in middle if e in kept] + head.entries[end:]


def corm(head: Head, seen: int, budget: int, recent: int, queries: int, block: int) -> None:
    if len(head.entries) <= budget:
        return
    older = len(head.entries) - recent
    count = budget + 1 - block - recent
    mattered, rest = [], []
    for entry in head.entries[:older]:
        last = [token for token in entry.mattered if seen - queries <= token < seen]
        (mattered if last else rest).append(entry)
    rest = best(rest, max(0, count - len(mattered)))
    kept = best(mattered, count) + rest
    head.entries = sorted(kept, key=lambda entry: entry.position) + head.entries[older:]


def cascade(head: Head, seen: int, sink: int, cascades: int, size: int, halve: bool, block: int) -> None:
    if len(head.entries) <= sink + cascades * size:
        return
    if not head.buffers:  # they were filled eagerly, the last with the oldest
        head.buffers = [head.entries[sink + i * size :][:size] for i in range(cascades - 1)][::-1]
        head.offers = [0] * (cascades - 1)
    newest = head.entries[sink + (cascades - 1) * size :]
    while len(newest) > size + 1 - block:
        offered: Entry | None = newest.pop(0)
        for i in range(1, cascades):
            if offered is None:
                break
            buffer, every = head.buffers[i - 1], 2 if halve else 2**i
            made = head.offers[i - 1]
            head.offers[i - 1] += 1
            if made % every == 0:
                buffer.append(offered)
                offered = buffer.pop(0)
            else:
                if offered.score >= buffer[-1].score:
                    buffer[-1] = offered
                offered = None
    head.entries = head.entries[:sink] + [e for buffer in head.buffers[::-1] for e in buffer] + newest


def elastic(head: Head, seen: int, sink: int, heavy: int, recent: int, distance: int, block: int) -> None:
    entries, bound = head.entries, sink + heavy + recent
    if len(entries) == bound + 1:
        for _ in range(block):
            del entries[len(entries) - distance - 1]
    elif len(entries) > bound + 1:
        last = len(entries) - recent
        kept = best(entries[sink:last], heavy + 1 - block)
        joining: dict[int, list[Entry]] = {entry.position: [] for entry in kept}
        place = {entry.position: i for i, entry in enumerate(entries)}
        for entry in entries[sink:last]:
            nearest = kept[0]
            for other in kept:
                mine = abs(place[other.position] - place[entry.position])
                if mine < abs(place[nearest.position] - place[entry.position]):
                    nearest = other
            joining[nearest.position].append(entry)
        means = {
            position: (np.mean([e.key for e in group], axis=0), np.mean([e.value for e in group], axis=0))
            for position, group in joining.items()
        }
        for entry in kept:
            # unrotated keys are all at one position, so their mean is that of the keys moved to any one
            entry.key, entry.value = means[entry.position]
            entry.quantised, entry.turned = False, None
        head.entries = entries[:sink] + kept + entries[last:]


def buzz(
    head: Head,
    seen: int,
    sink: int,
    window: int,
    threshold: int,
    stride: int,
    local_max: bool,
    accumulate: bool,
    log_n: int | None,
) -> None:
    while len(head.entries) - sink - window > threshold:
        last = len(head.entries) - window
        sinks, middle, recent = head.entries[:sink], head.entries[sink:last], head.entries[last:]
        old = [entry for i, entry in enumerate(middle[: head.sampled]) if i % ((stride + 1) // 2) == 0]
        new = []
        cell: list[Entry] = []
        fresh = middle[head.sampled :]
        for i, entry in enumerate(fresh):
            cell.append(entry)
            if len(cell) == stride or i == len(fresh) - 1:
                winner = cell[0]
                for other in cell[1:]:
                    if local_max and other.score > winner.score:
                        winner = other
                new.append(winner)
                cell = []
        for entry in sinks + old:
            entry.score = 0.0
        head.entries = sinks + old + new + recent
        head.sampled = len(old) + len(new)


RULES: dict[str, Callable[..., None]] = {
    rule.__name__: rule for rule in (buzz, buzz2, cascade, corm, elastic, full, h2o, streaming, window)
}
