"""Entries in eight bits: whole numbers from -127 to 127, and one float32 scale for each entry and head.

As in any narrow dtype, an entry is rounded as it is written, here by at most 1/254 of its largest channel.
Rounding it again gives the same codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MOST = 127
_LEAST = 1e-12  # of a scale, for entries of zeros


def rounded(entries: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 `[..., head_dim]` of floating entries, and their scales, float32 `[...]`: NaN of an entry
    that is not finite."""
    wide = entries.float()
    largest = wide.abs().amax(dim=-1).clamp_(min=_LEAST * _MOST)
    largest += 0 * wide.sum(dim=-1)
    codes = (wide * (_MOST / largest).unsqueeze(-1)).nan_to_num_(0).round_()
    return codes.to(torch.int8), largest * (1 / _MOST)


def widened(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What `rounded` made codes of, in `dtype`."""
    return codes.to(dtype).mul_(scales.unsqueeze(-1).to(dtype))
