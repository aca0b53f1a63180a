"""Choosing entries by score, the same on every device."""

from __future__ import annotations

import torch
from torch import Tensor


def top(score: Tensor, count: int, preferred: Tensor | None = None) -> Tensor:
    """The places of the `count` largest of `[..., n]`, ascending, int64; the first wins a tie.

    Where `preferred`, bool `[..., n]`, is given, those it marks come before all others.
    """
    # topk breaks ties as it likes; a stable sort lets the first win on every device
    ranked = score.argsort(dim=-1, descending=True, stable=True)
    if preferred is not None:
        marked = preferred.gather(-1, ranked).int()
        ranked = ranked.gather(-1, marked.argsort(dim=-1, descending=True, stable=True))
    return ranked[..., :count].sort(dim=-1).values


def honeycomb(score: Tensor, hot: int, cells: int) -> Tensor:
    """The places of the `hot` largest of `[..., n]`, and of the largest in each cell of the others.

    The others are cut in order into `cells` cells whose sizes differ by at most one. The first wins a tie.

    Args:
        score: floating `[..., n]`, n at least `hot + cells`.
        hot: how many stay wherever they are.
        cells: how many cells there are.

    Returns:
        int64 `[..., hot + cells]`, ascending.
    """
    ranked = score.argsort(dim=-1, descending=True, stable=True)
    others = ranked[..., hot:].sort(dim=-1).values
    count = others.shape[-1]
    edges = torch.arange(cells + 1, device=score.device) * count // max(cells, 1)
    place = edges[:-1, None] + torch.arange(-(-count // max(cells, 1)), device=score.device)
    outside = place >= edges[1:, None]
    in_cells = score.gather(-1, others)[..., place.clamp(max=count - 1)].masked_fill(outside, float("-inf"))
    best = edges[:-1] + in_cells.argmax(dim=-1)
    return torch.cat([ranked[..., :hot], others.gather(-1, best)], dim=-1).sort(dim=-1).values
