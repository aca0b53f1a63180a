"""Cascading KV cache: buffers that reach ever further back, ever more sparsely."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from buzz.policies.blockwise import Blockwise
from buzz.policy import Compaction, PolicyError, State, View
from buzz.regions import Kind, Region, in_order


@dataclass(frozen=True, kw_only=True)
class Cascade(Blockwise):
    """Attention sinks and a cascade of buffers (Cascading KV cache, https://arxiv.org/abs/2406.17808).

    After the first `sink` entries come `cascades` buffers of `size` entries. Buffer 0 takes every token;
    what a buffer evicts, its oldest, is offered to the next. Buffer i accepts every 2^i-th offer, the
    first included, and makes room by evicting; another offer replaces its newest entry if its score is at
    least as large, so of 2^i consecutive offers each head keeps its best (last wins a tie). What the last
    buffer evicts is gone. As with the authors' `eager_fill`, nothing is thinned until all buffers are
    full; from then on each compaction finds them full, and as many offers were made to buffer 1 as entries
    are gone: the rule needs no counters.

    Due when more than `bound = sink + cascades * size` entries are held; then buffer 0 evicts down to
    `size + 1 - block`, by the scores at that moment.

    The paper's score is an exponential moving average of the weights with factor 0.9999999. Attention
    records the decayed sum, which is the average but for a constant factor, and ranks the same.

    Attributes:
        sink: first entries, always kept.
        cascades: number of buffers, from 1 to 16.
        size: entries of a buffer.
        halve: True lets every buffer accept every second offer, as the authors' code does (there buffer i
            accepts when the session's length divides by 2^i, and is offered something half as often as
            the one before): then the buffers reach back 1, 2, 4, 8 times `size`, and not 1, 2, 8, 64.
    """

    sink: int = 64
    cascades: int = 4
    size: int = 125
    halve: bool = False

    name: ClassVar[str] = "cascade"

    def validate(self) -> None:
        super().validate()
        if not 1 <= self.cascades <= 16:
            raise PolicyError(f"cascade: cascades={self.cascades} is not between 1 and 16")

    @property
    def bound(self) -> int:
        return self.sink + self.cascades * self.size

    @property
    def evictable(self) -> int:
        return self.size

    @property
    def states(self) -> tuple[State, ...]:
        return (State("score", decay=0.9999999),)

    def compact(self, view: View) -> Compaction:
        """Evict from buffer 0, and pass on from buffer to buffer: `rest` entries stay."""
        start = self.bound - self.size  # of buffer 0
        end = view.n - (self.rest - start)
        offers, before = view.span(start, end), view.evicted  # and offers made earlier
        kept = [view.span(end, view.n)]
        for i in range(1, self.cascades):
            held = view.span(start - i * self.size, start - (i - 1) * self.size)
            every = 2 if self.halve else 2**i
            if before % every:  # the newest entry won its group so far, and its group is open
                held, offers = held[..., :-1], torch.cat([held[..., -1:], offers], dim=-1)
            filled = torch.cat([held, self._best(view, offers, every, before)], dim=-1)
            offers, before = filled[..., : -self.size], -(-before // every)
            kept.append(filled[..., -self.size :])
        kept.append(view.span(0, self.sink))
        return Compaction(torch.cat(kept[::-1], dim=-1))

    def regions(self, n: int, sampled: int, seen: int) -> tuple[Region, ...]:
        """Sinks, the buffers that accept the best of several offers, and buffer 0. Until something is evicted
        nothing has been offered to anyone."""
        thinned = self.bound - self.size if seen > n else 0
        return in_order(
            n,
            (Kind.SINK, self.sink),
            (Kind.CELL, thinned),
            (Kind.MIDDLE, n - self.size),
            (Kind.WINDOW, n),
        )

    def _scaled(self, bound: int) -> dict[str, int]:
        """The buffers share it, and the sinks take what does not divide; at a smaller one they shrink too."""
        sink = min(self.sink, self.sink * bound // self.bound)
        size, rest = divmod(bound - sink, self.cascades)
        return {"size": size, "sink": sink + rest}

    @staticmethod
    def _best(view: View, offers: Tensor, every: int, before: int) -> Tensor:
        """The winners of each group of `every` offers, `[..., kv_heads, groups]`.

        `offers` are `[..., kv_heads, k]`. If the first group is open, they begin with its winner so far.
        """
        done = max(before % every - 1, 0)  # earlier offers of an open group, but for its winner
        groups = -(-(done + offers.shape[-1]) // every)
        # repeating the first and the last of them fills up the groups and changes no winner
        place = torch.arange(-done, groups * every - done, device=offers.device)
        rivals = offers[..., place.clamp(0, max(offers.shape[-1] - 1, 0))]
        shape = (*rivals.shape[:-1], groups, every)
        score = view.state["score"].gather(-1, rivals).view(shape)
        best = every - 1 - score.flip(-1).argmax(dim=-1, keepdim=True)  # the last one wins a tie
        return rivals.reshape(shape).gather(-1, best).squeeze(-1)
