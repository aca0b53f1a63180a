"""Choosing entries by score, the same on every device."""

from __future__ import annotations

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
