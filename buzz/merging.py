"""Merging entries: what a compaction drops flows into what it keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from buzz.rotary import Rotary


def merged(
    keys: Tensor, values: Tensor, place: Tensor, index: Tensor, merge: Tensor, rotary: Rotary
) -> tuple[Tensor, Tensor]:
    """A layer's survivors as means of what is merged into them.

    Keys are moved to their survivor's position first: the mean of keys at different positions would mean
    nothing.

    Args:
        keys: floating `[H, n, head_dim]`, rotated.
        values: floating `[H, n, head_dim]`.
        place: int64 `[H, n]`, the positions to which the keys are rotated.
        index: int64 `[H, m]`, the survivors.
        merge: int64 `[H, n]`, as in `Compaction`.
        rotary: rotates the keys.

    Returns:
        Keys and values `[H, m, head_dim]`.
    """
    joins = merge >= 0
    goal = merge.clamp(min=0)
    moved = rotary.rotate(keys, place.gather(-1, index).gather(-1, goal) - place)
    count = torch.zeros(index.shape, device=merge.device, dtype=torch.int64).scatter_add_(
        -1, goal, joins.long()
    )

    def mean(entries: Tensor) -> Tensor:
        wide = entries.to(torch.promote_types(entries.dtype, torch.float32))
        wide = wide.masked_fill(~joins.unsqueeze(-1), 0)  # what is dropped may be anything
        total = wide.new_zeros(*index.shape, entries.shape[-1])
        total.scatter_add_(-2, goal.unsqueeze(-1).expand_as(wide), wide)
        return (total / count.unsqueeze(-1)).to(entries.dtype)

    return mean(moved), mean(values)


def goals(index: Tensor, n: int) -> Tensor:
    """For each of `n` entries its place in `index` `[L, H, m]`, -1 where it has none: a merge of nothing."""
    place = torch.arange(index.shape[-1], device=index.device).expand_as(index)
    return index.new_full((*index.shape[:-1], n), -1).scatter(-1, index, place)
