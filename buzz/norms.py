"""The lengths of values, by which policies may weigh scores."""

from __future__ import annotations

import torch
from torch import Tensor

from buzz import operators


def norms(entries: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The lengths of entries `[L, H, n, head_dim]`, which are codes where there are scales `[L, H, n]`:
    `[L, H, n]` in `dtype`, by the operator `buzz::norms`."""
    lengths: Tensor = torch.ops.buzz.norms(entries, scales, dtype)
    return lengths


def default_norms(entries: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    if scales is None:
        lengths: Tensor = torch.linalg.vector_norm(entries, dim=-1, dtype=dtype)
        return lengths
    each = [torch.linalg.vector_norm(codes.to(dtype), dim=-1) for codes in entries]
    return torch.stack(each).mul_(scales)


operators.define("buzz::norms(Tensor entries, Tensor? scales, ScalarType dtype) -> Tensor", default_norms)
