"""BUZZ2: the most valuable entries, and between them the best of each cell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from buzz.policies.blockwise import Blockwise
from buzz.policy import Compaction, PolicyError, Positions, State, View
from buzz.ranking import honeycomb
from buzz.regions import Kind, Region


@dataclass(frozen=True, kw_only=True)
class Buzz2(Blockwise):
    """BUZZ's honeycomb (https://arxiv.org/abs/2410.23079) with full cells, fair scores and weighed values.

    The first `sink` and last `window` entries always stay. When more than `bound = sink + window + hot +
    cells` are held, the middle between them is compacted just as far as needed, to `block - 1` fewer than
    fit: per KV head the `hot` most important entries stay wherever they are, and the others are cut in
    order into as many cells of equal size as places are left, in each of which the most important stays.
    So every region keeps somebody who remembers it. The first wins a tie.

    An entry's importance is the sum of the weights that it received times the squared norm of its value (as
    in VATP, https://arxiv.org/abs/2406.12335): about the squared error that its loss would cause. The sum
    forgets: a query `horizon` queries ago counts 1/e as much as the last. Scores never restart.

    What differs from `buzz`, and what each difference is worth, is measured in docs/quality.md.

    Attributes:
        positions: `original` by default: documents that are compacted once keep more of their meaning.
        sink: first entries, always kept.
        window: most recent entries, always kept.
        hot: entries kept for their importance alone.
        cells: entries kept as the most important of their cell.
        horizon: queries over which the sum of weights forgets; at least 2. None: it never does.
        mean: True takes the mean over the queries since the entry came, which forgets alike, so that early
            tokens have no advantage; but late ones were seen by few queries, and all of them near.
        values: False leaves the values out.
    """

    positions: Positions = "original"
    sink: int = 4
    window: int = 64
    hot: int = 330
    cells: int = 166
    horizon: int | None = 512
    mean: bool = False
    values: bool = True

    name: ClassVar[str] = "buzz2"
    sizes: ClassVar[tuple[str, ...]] = ("window", "hot", "cells")

    def validate(self) -> None:
        super().validate()
        if self.horizon is not None and self.horizon < 2:
            raise PolicyError(f"buzz2: horizon={self.horizon} is less than 2 queries: no score would be left")

    @property
    def bound(self) -> int:
        return self.sink + self.window + self.hot + self.cells

    @property
    def evictable(self) -> int:
        return self.hot + self.cells

    @property
    def states(self) -> tuple[State, ...]:
        return (State("score", decay=self._decay),)

    @property
    def weighs_values(self) -> bool:
        return self.values

    def compact(self, view: View) -> Compaction:
        """Keep `rest` entries."""
        middle = slice(self.sink, view.n - self.window)
        places = self.rest - self.sink - self.window
        hot = self.hot * places // (self.hot + self.cells)
        kept = self.sink + honeycomb(self._importance(view, middle), hot, places - hot)
        return Compaction(torch.cat([view.span(0, self.sink), kept, view.span(middle.stop, view.n)], dim=-1))

    def regions(self, n: int, sampled: int, seen: int) -> tuple[Region, ...]:
        """Sinks, what the last compaction chose, what has come since, and the window. The hot lie among the
        best of the cells, and count as those; without cells they are heavy."""
        chosen = Kind.CELL if self.cells else Kind.HEAVY
        return self._around(chosen, n, seen, sink=self.sink, recent=self.window)

    def _importance(self, view: View, some: slice) -> Tensor:
        """Of some of the entries, `[..., kv_heads, m]`."""
        importance = view.state["score"][..., some]
        if self.mean:
            age = (view.seen - view.position[..., some]).to(importance.dtype)
            decay = self._decay
            importance = importance / (age if decay == 1 else (1 - decay**age) / (1 - decay))
        if self.values:
            if view.value_norm is None:
                raise ValueError("buzz2 weighs values, and the view has no norms of them")
            importance = importance * view.value_norm[..., some] ** 2
        return importance

    @property
    def _decay(self) -> float:
        return 1.0 if self.horizon is None else 1 - 1 / self.horizon
