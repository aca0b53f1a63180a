"""The memory in which a session's entries lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from buzz.policy import State


@dataclass
class Buffers:
    """Memory for a session's entries, L layers of H KV heads: fresh tensors, or views into a pool's slot.

    Attributes:
        keys: floating `[L, H, C, head_dim]`, rotated.
        values: floating `[L, H, C, head_dim]`.
        position: int32 `[L, H, C]`, each entry's original token position.
        state: by name, `[L, H, C]`: what policies declared in `states`; others are not touched.
    """

    keys: Tensor
    values: Tensor
    position: Tensor
    state: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def empty(
        cls,
        layers: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        states: Sequence[State] = (),
    ) -> Self:
        """Fresh zeroed memory for `capacity` entries; masses in float32, or float64 where `dtype` is."""
        shape = (layers, kv_heads, capacity)
        wide = {torch.float32: torch.promote_types(dtype, torch.float32)}
        return cls(
            keys=torch.zeros(*shape, head_dim, dtype=dtype, device=device),
            values=torch.zeros(*shape, head_dim, dtype=dtype, device=device),
            position=torch.zeros(shape, dtype=torch.int32, device=device),
            state={
                state.name: torch.zeros(shape, dtype=wide.get(state.dtype, state.dtype), device=device)
                for state in states
            },
        )

    @property
    def capacity(self) -> int:
        """Entries that fit."""
        return self.keys.shape[2]

    def copy_from(self, source: Buffers, n: int) -> None:
        """Copy the first `n` entries of `source`, and the states that both have.

        Raises:
            ValueError: they do not fit.
        """
        self.require(n)
        self.keys[:, :, :n] = source.keys[:, :, :n]
        self.values[:, :, :n] = source.values[:, :, :n]
        self.position[:, :, :n] = source.position[:, :, :n]
        for name in self.state.keys() & source.state.keys():
            self.state[name][:, :, :n] = source.state[name][:, :, :n]

    def require(self, n: int) -> None:
        """Check that `n` entries fit.

        Raises:
            ValueError: they do not.
        """
        if n > self.capacity:
            raise ValueError(f"{n} entries do not fit a capacity of {self.capacity}")
