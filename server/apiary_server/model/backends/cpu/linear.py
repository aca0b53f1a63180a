"""Linear layers on a CPU: products by oneDNN, with weights packed once, or of eight-bit integers."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 256  # of the products that a packed weight is laid out for: best from 1 to 256
_LEAST = 1e-12  # of a scale, for rows of zeros


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
    per row, both `turned`.

    A row's scale is its own and sums of integers are exact, so a session's result does not depend on who
    shares its step.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        codes, self._scale = quantised(torch.cat([turned(some) for some in weight.split(_ROWS)]))
        self._codes = codes.t()
        self._bias = bias

    def __call__(self, rows: Tensor) -> Tensor:
        rows = turned(rows)
        scale = rows.abs().amax(dim=-1, keepdim=True).clamp_(min=_LEAST) / 127
        codes = (rows / scale).round_().to(torch.int8)
        result = torch._int_mm(codes, self._codes).float().mul_(self._scale).mul_(scale)
        return result if self._bias is None else result.add_(self._bias)


def turned(rows: Tensor) -> Tensor:
    """Rows times an orthonormal matrix, which spreads an outlier over all of a row and leaves the products of
    rows as they are (QuaRot, arXiv 2404.00456). It is a Hadamard matrix of the largest power of 2 that fits,
    over the first elements, and where some are left, `signs` and another over the last elements.

    Args:
        rows: float32 `[count, length]`.
    """
    length = rows.shape[1]
    window = 1 << (length.bit_length() - 1)
    rows = torch.cat((_hadamard(rows[:, :window]), rows[:, window:]), dim=1)
    if window < length:
        rows *= signs(length)
        rows[:, -window:] = _hadamard(rows[:, -window:])
    return rows


def signs(length: int) -> Tensor:
    """1 or -1 for each element of a row, the sequence of Rudin and Shapiro: without them the second Hadamard
    matrix would gather again what the first has spread."""
    places = torch.arange(length)
    ones = torch.stack([(places >> bit) & (places >> (bit + 1)) & 1 for bit in range(length.bit_length())])
    return 1.0 - 2.0 * (ones.sum(dim=0) % 2)


def _hadamard(rows: Tensor) -> Tensor:
    """Rows `[count, length]`, a power of 2, times the orthonormal Hadamard matrix, by butterflies."""
    count, length = rows.shape
    half = 1
    while half < length:
        left, right = rows.reshape(count, length // (2 * half), 2, half).unbind(2)
        rows = torch.stack((left + right, left - right), dim=2)
        half *= 2
    result: Tensor = rows.reshape(count, length) * length**-0.5
    return result


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 `[out, in]` of a weight that was `turned`, and one scale per output channel, `[out]`."""
    scale = weight.abs().amax(dim=1).clamp_(min=_LEAST) / 127
    return (weight / scale[:, None]).round_().to(torch.int8), scale
