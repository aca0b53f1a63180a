"""Weights that come from a quantised file: the few numbers that they are.

GGUF's simple formats (llama.cpp) have a scale for each block of 32 weights of a row, some of them an offset
beside, and whole numbers of 4, 5 or 8 bits. Dequantised they are float32, several times as large; but they
can be recognised.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 32
"""Inputs that a scale is for."""

_SPANS = (15, 31)  # steps from a block's least weight to its largest: Q4_1, Q5_1
_SIDES = (127, 8, 16)  # steps from zero to its largest size: Q8_0, Q4_0, Q5_0
_ZERO = 128  # the code of zero, where it is in the middle
_TOGETHER = 2**14  # blocks that are looked at together, so that temporary memory stays small


@dataclass(frozen=True, slots=True)
class Codes:
    """A weight equals `scale * code + least`, rounded once to float32 (of zeros the sign may be lost).

    Attributes:
        codes: uint8 `[outputs, inputs]`.
        scales: float32 `[outputs, inputs / GROUP]`.
        least: the same.
    """

    codes: Tensor
    scales: Tensor
    least: Tensor


def decomposed(weight: Tensor) -> Codes | None:
    """What makes a float32 weight `[outputs, inputs]`; None: it is not of such a file, which its first blocks
    tell."""
    outputs, inputs = weight.shape
    if inputs % GROUP or not outputs:
        return None
    found = []
    for blocks in weight.reshape(-1, GROUP).split(_TOGETHER):
        some = _fit(blocks)
        if some is None:
            return None
        found.append(some)
    codes, scales, least = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Codes(codes.view(outputs, inputs), scales.view(outputs, -1), least.view(outputs, -1))


def _fit(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Codes `[blocks, GROUP]`, scales and least `[blocks]`."""
    codes = torch.empty(blocks.shape, dtype=torch.uint8)
    scales, least = torch.empty(2, len(blocks))
    left = torch.arange(len(blocks))
    for steps in (*_SPANS, *(-side for side in _SIDES)):
        some = blocks if len(left) == len(blocks) else blocks[left]
        low = some.amin(dim=-1)
        most = some.amax(dim=-1) - low if steps > 0 else some.abs().amax(dim=-1)
        scale = (most / abs(steps)).half().float()  # as such files have it
        if steps < 0:
            low = -_ZERO * scale
        code = ((some - low[:, None]) / scale.where(scale > 0, 1)[:, None]).round_().clamp_(0, 255)
        exact = torch.addcmul(low.double()[:, None], code.double(), scale.double()[:, None]).float()
        fits = (exact == some).all(dim=-1)
        at = left[fits]
        codes[at], scales[at], least[at] = code[fits].to(torch.uint8), scale[fits], low[fits]
        left = left[~fits]
        if not len(left):
            return codes, scales, least
    return None
