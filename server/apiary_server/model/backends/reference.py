"""The model's own modules, as transformers has them: what all other backends are compared with."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from apiary_server.model.attention import Batch


class Reference:
    """As `Backend`.

    Args:
        model: a decoder whose attention implementation is `attention.NAME`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def forward(self, tokens: Tensor, positions: Tensor, keep: Tensor, batch: Batch) -> Tensor:
        logits: Tensor = self.model(
            input_ids=tokens[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=keep,
            apiary_batch=batch,
        ).logits
        return logits[0]
