"""BUZZ: a honeycomb of cells, in each of which the most attended entry survives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import pad

from buzz.policy import Compaction, Policy, PolicyError, State, View
from buzz.regions import Kind, Region, in_order


@dataclass(frozen=True, kw_only=True)
class Buzz(Policy):
    """Beehive-structured sparse cache with segmented heavy hitters (BUZZ, https://arxiv.org/abs/2410.23079).

    The first `sink` and last `window` entries always stay. When the middle between them holds more than
    `threshold`, it is compacted: of the entries that an earlier compaction sampled, every
    `(stride + 1) // 2`-th stays, from the first; the new ones are cut into cells of `stride` (the last
    may be shorter), and in each cell each KV head keeps its entry with the largest score (first wins a
    tie). Then the whole middle counts as sampled. Scores of the sink and of formerly sampled entries
    restart at 0; the others' go on. All heads keep equally many, so `bound = sink + window + threshold`.

    Attributes:
        sink: first entries, always kept.
        window: most recent entries, always kept.
        threshold: most middle entries at rest; at least 1.
        stride: cell size; at least 3, since with less the sampled entries never shrink.
        local_max: False keeps each cell's first entry instead of its most attended.
        accumulate: False uses the scores of the last segment only (the authors' "fast" variant).
        log_n: scale attention logits by `max(1, log(n) / log(log_n))`, n keys in view; at least 2.
    """

    sink: int = 4
    window: int = 160
    threshold: int = 400
    stride: int = 5
    local_max: bool = True
    accumulate: bool = True
    log_n: int | None = None

    name: ClassVar[str] = "buzz"
    sizes: ClassVar[tuple[str, ...]] = ("window", "threshold")

    def validate(self) -> None:
        if self.stride < 3:
            raise PolicyError(
                f"buzz: stride={self.stride} is less than 3: sampled entries would never shrink, "
                "and compaction would not end"
            )
        if self.threshold < 1:
            raise PolicyError(
                f"buzz: threshold={self.threshold} is less than 1: the middle cannot shrink to nothing"
            )
        if self.log_n is not None and self.log_n < 2:
            raise PolicyError(f"buzz: log_n={self.log_n} is less than 2, and log(1) = 0 cannot divide")

    @property
    def bound(self) -> int:
        return self.sink + self.window + self.threshold

    @property
    def states(self) -> tuple[State, ...]:
        return (State("score", per="session" if self.accumulate else "segment"),)

    def due(self, n: int, sampled: int) -> bool:
        return n - self.sink - self.window > self.threshold

    def compact(self, view: View) -> Compaction:
        """Thin the middle once."""
        start, end = self.sink + view.sampled, view.n - self.window  # of the new middle entries
        old = view.span(self.sink, start, (self.stride + 1) // 2)
        new = view.span(start, end, self.stride)
        score = view.state["score"]
        if self.local_max:
            cells = new.shape[-1]
            padded = pad(score[..., start:end], (0, cells * self.stride - (end - start)), value=float("-inf"))
            new = new + padded.view(*padded.shape[:-1], cells, self.stride).argmax(dim=-1)
        index = torch.cat([view.span(0, self.sink), old, new, view.span(end, view.n)], dim=-1)
        kept = score.gather(-1, index)
        kept[..., : self.sink + old.shape[-1]] = 0
        return Compaction(index, old.shape[-1] + new.shape[-1], {"score": kept})

    def regions(self, n: int, sampled: int, seen: int) -> tuple[Region, ...]:
        """Sinks, the sampled middle (the best of their cells at first, every `(stride + 1) // 2`-th of those
        since), the new middle, and the window."""
        return in_order(
            n,
            (Kind.SINK, self.sink),
            (Kind.SAMPLED, self.sink + sampled),
            (Kind.MIDDLE, n - self.window),
            (Kind.WINDOW, n),
        )
