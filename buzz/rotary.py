"""Rotary positions (RoFormer, https://arxiv.org/abs/2104.09864): moving keys that are rotated already."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rotary:
    """A model's rotary embedding, in the Llama convention (`rotate_half`).

    Rotations compose: a key at position p is moved to q by rotating it by q - p, and an unrotated key
    is one at position 0. Dimensions beyond the rotary ones pass through.

    Attributes:
        inv_freq: floating `[rotary_dim / 2]`, radians per position.
        max_positions: the length that the model was trained for.
    """

    inv_freq: Tensor
    max_positions: int

    @classmethod
    def of(
        cls, head_dim: int, max_positions: int, theta: float = 10_000.0, device: torch.device | None = None
    ) -> Self:
        """The plain embedding: `theta ** (-2i / head_dim)`."""
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
        return cls((theta**-exponent).to(device=device, dtype=torch.float32), max_positions)

    def rotate(self, keys: Tensor, delta: Tensor) -> Tensor:
        """Move keys by position differences.

        Args:
            keys: floating `[..., n, head_dim]`; not changed.
            delta: integer `[..., n]`, broadcast against the keys' leading dimensions.

        Returns:
            `[..., n, head_dim]` in the keys' dtype. Keys below float32 are rotated in float32, then
            rounded once.
        """
        half = self.inv_freq.shape[0]
        # a float32 angle of thousands of radians is off by 1e-4; take it wide wherever the device can
        wide = torch.float32 if keys.device.type == "mps" else torch.float64
        angle = delta.to(wide).unsqueeze(-1) * self.inv_freq.to(device=keys.device, dtype=wide)
        work = torch.promote_types(keys.dtype, torch.float32)
        cos, sin = angle.cos().to(work), angle.sin().to(work)
        first, second = keys[..., :half].to(work), keys[..., half : 2 * half].to(work)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(keys.dtype)
        return torch.cat([turned, keys[..., 2 * half :]], dim=-1) if 2 * half < keys.shape[-1] else turned
