"""Linear layers on a CPU: products by oneDNN, with weights packed once, or of eight-bit integers."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 256  # of the products that a packed weight is laid out for: best from 1 to 256
_LEAST = 1e-12  # of a scale, for rows of zeros
_DIGIT = 254  # the second digit of an activation counts this much less: half a step of the first, either way


class Packed:
    """A linear layer whose weight lies in the order in which oneDNN's kernels read it."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
        self._bias = bias

    def __call__(self, rows: Tensor) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")
        return result


class Int8:
    """A linear layer of eight-bit integers: weights with one scale per output channel, activations with one
    per row and two digits of eight bits.

    One digit of activations would cost 4% of the default model's perplexity, two cost nothing, and both are
    rows of one product, which reads the weights once. A row's scale is its own and sums of integers are
    exact, so a session's result does not depend on who shares its step.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        codes, self._scale = quantised(weight)
        self._codes = codes.t()
        self._bias = bias

    def __call__(self, rows: Tensor) -> Tensor:
        scale = rows.abs().amax(dim=-1, keepdim=True).clamp_(min=_LEAST) / 127
        first = rows / scale
        codes = torch.empty(2, *rows.shape, dtype=torch.int8)
        codes[0] = rounded = first.round()
        codes[1] = first.sub_(rounded).mul_(_DIGIT).round_()
        high, low = torch._int_mm(codes.flatten(0, 1), self._codes).chunk(2)
        result = high.float().add_(low, alpha=1 / _DIGIT).mul_(self._scale).mul_(scale)
        return result if self._bias is None else result.add_(self._bias)


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 `[out, in]` and one scale per output channel, `[out]`."""
    scale = weight.abs().amax(dim=1).clamp_(min=_LEAST) / 127
    return (weight / scale[:, None]).round_().to(torch.int8), scale
