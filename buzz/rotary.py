"""Rotary positions (RoFormer, https://arxiv.org/abs/2104.09864): moving keys that are rotated already."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import embedding

_REACH = 2**13  # position differences up to this are looked up: at most 16 MB for 128 dimensions in float64


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
    _tables: dict[tuple[torch.dtype, bool], Tensor] = field(default_factory=dict, init=False, repr=False)

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
            delta: integer `[..., n]`, broadcast to the keys' leading dimensions.

        Returns:
            `[..., n, head_dim]` in the keys' dtype. Keys below float32 are rotated in float32, then
            rounded once.
        """
        half = self.inv_freq.shape[0]
        work = torch.promote_types(keys.dtype, torch.float32)
        cos, sin = self._turns(delta, work).split(half, dim=-1)
        first, second = keys[..., :half].to(work), keys[..., half : 2 * half].to(work)
        turned = [(first * cos).addcmul_(second, sin, value=-1), (second * cos).addcmul_(first, sin)]
        return torch.cat([*(part.to(keys.dtype) for part in turned), keys[..., 2 * half :]], dim=-1)

    @property
    def dim(self) -> int:
        """How many dimensions are rotated."""
        return 2 * len(self.inv_freq)

    def turns(self, reach: int) -> Tensor:
        """Cosines, and behind them sines, that move keys from 0 to each position: float32, `[at least reach,
        dim]`, on the CPU."""
        return self._table(reach, torch.float32, mirrored=False)

    def _turns(self, delta: Tensor, dtype: torch.dtype) -> Tensor:
        """Cosines, and behind them sines, of the angles: `[..., n, rotary_dim]`.

        They would cost more than the products, but there are few different ones: a table has them, which
        grows to what is asked for. (Elsewhere than on a CPU they cost little, and to look at the differences
        would make the host wait.) Threads may replace each other's tables; each reads the one it found.
        """
        if delta.device.type != "cpu" or delta.numel() == 0:
            return self._computed(delta, dtype)
        least, most = delta.aminmax()
        reach = max(-int(least), int(most) + 1)
        if reach > _REACH:
            return self._computed(delta, dtype)
        table = self._table(reach, dtype, mirrored=True)
        return embedding(delta + len(table) // 2, table)

    def _table(self, reach: int, dtype: torch.dtype, *, mirrored: bool) -> Tensor:
        """Of the differences from 0, or where it is mirrored from `-reach`, to `reach`, or a little more."""
        table = self._tables.get((dtype, mirrored))
        if table is None or len(table) < (1 + mirrored) * reach:
            reach = 1 << max(0, reach - 1).bit_length()
            with torch.inference_mode(False):  # it outlives the caller's mode
                table = self._computed(torch.arange(-reach if mirrored else 0, reach), dtype)
            self._tables[dtype, mirrored] = table
        return table

    def _computed(self, delta: Tensor, dtype: torch.dtype) -> Tensor:
        # a float32 angle of thousands of radians is off by 1e-4; take it wide wherever the device can
        wide = torch.float32 if delta.device.type == "mps" else torch.float64
        angle = delta.to(wide).unsqueeze(-1) * self.inv_freq.to(device=delta.device, dtype=wide)
        return torch.cat([angle.cos(), angle.sin()], dim=-1).to(dtype)
