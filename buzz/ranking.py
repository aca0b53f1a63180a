"""Choosing entries by score, the same on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from buzz import operators


def top(score: Tensor, count: int, preferred: Tensor | None = None) -> Tensor:
    """The places of the `count` largest of `[..., n]`, ascending, int64; the first wins a tie.

    Where `preferred`, bool `[..., n]`, is given, those it marks come before all others.
    """
    if preferred is None:
        return _places(_largest(_numbers(score), count), count)
    ranked = score.argsort(dim=-1, descending=True, stable=True)
    marked = preferred.gather(-1, ranked).int()
    ranked = ranked.gather(-1, marked.argsort(dim=-1, descending=True, stable=True))
    chosen = torch.zeros_like(preferred).scatter_(-1, ranked[..., :count], True)
    return _places(chosen, count)


def honeycomb(score: Tensor, hot: int, cells: int) -> Tensor:
    """The places of the `hot` largest of `[..., n]`, and of the largest in each cell of the others: the
    operator `buzz::honeycomb`.

    The others are cut in order into `cells` cells whose sizes differ by at most one. The first wins a tie,
    and NaN counts as infinite.

    Args:
        score: floating `[..., n]`, n at least `hot + cells`.
        hot: how many stay wherever they are.
        cells: how many cells there are.

    Returns:
        int64 `[..., hot + cells]`, ascending.

    Raises:
        ValueError: there are fewer entries.
    """
    if not 0 <= hot <= hot + cells <= score.shape[-1]:
        raise ValueError(f"{hot} hot entries and {cells} cells are not among {score.shape[-1]} entries")
    places: Tensor = torch.ops.buzz.honeycomb(score, hot, cells)
    return places


def default_honeycomb(score: Tensor, hot: int, cells: int) -> Tensor:
    score = _numbers(score)
    count = score.shape[-1] - hot
    kept = _largest(score, hot)
    if not cells:
        return _places(kept, hot)
    others = _places(~kept, count)
    edges = torch.arange(cells + 1, device=score.device) * count // cells
    place = edges[:-1, None] + torch.arange(-(-count // cells), device=score.device)
    outside = place >= edges[1:, None]
    in_cells = score.gather(-1, others)[..., place.clamp(max=count - 1)].masked_fill(outside, float("-inf"))
    best = edges[:-1] + in_cells.argmax(dim=-1)
    return _places(kept.scatter_(-1, others.gather(-1, best), True), hot + cells)


operators.define("buzz::honeycomb(Tensor score, int hot, int cells) -> Tensor", default_honeycomb)


def _numbers(score: Tensor) -> Tensor:
    """NaN counts as infinite."""
    return score.nan_to_num(torch.inf, torch.inf, -torch.inf)


def _largest(score: Tensor, count: int) -> Tensor:
    """Which of `[..., n]`, none of them NaN, are the `count` largest, bool; the first wins a tie.

    A tenth of the time of a stable sort; topk alone breaks ties as it likes.
    """
    if not count:
        return torch.zeros_like(score, dtype=torch.bool)
    least = score.topk(count, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    above, level = score > least, score == least
    room = count - above.sum(dim=-1, keepdim=True)
    return above | level & (level.cumsum(dim=-1) <= room)


def _places(marked: Tensor, count: int) -> Tensor:
    """The places of what is marked, ascending, int64 `[..., count]`: so many are in each row. Cheaper than
    sorting them."""
    rank = torch.where(marked, marked.cumsum(dim=-1) - 1, count)
    places = torch.arange(marked.shape[-1], device=marked.device).expand_as(rank)
    return rank.new_empty(*rank.shape[:-1], count + 1).scatter_(-1, rank, places)[..., :count]
