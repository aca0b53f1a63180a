"""The interface of a model's compute."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from apiary_server.model.attention import Batch


class Backend(Protocol):
    """Runs a model's layers over packed rows of many sessions."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def dtype(self) -> torch.dtype:
        """Of what lies between the layers."""

    def forward(self, tokens: Tensor, positions: Tensor, keep: Tensor, batch: Batch) -> Tensor:
        """Compute the rows of a step, and write their entries into the sessions' caches.

        Args:
            tokens: int64 `[T]`, on the device.
            positions: int64 `[T]`: the rotary position of each.
            keep: int64 `[R]`: the rows whose logits are wanted.
            batch: where the rows belong; its `meanwhile` is called once.

        Returns:
            `[R, vocab]`.
        """
