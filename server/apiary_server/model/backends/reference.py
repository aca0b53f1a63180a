"""The model's own modules, as transformers has them: what all other backends are compared with.

Attention goes through transformers' `AttentionInterface`, which serves every decoder that uses it, without
patching it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from apiary_server.model.attention import Batch
from apiary_server.model.operations import Operations

NAME = "apiary"  # of our attention, for transformers
_OPERATIONS = Operations()


class Reference:
    """As `Backend`.

    Args:
        model: a decoder whose attention implementation is `NAME`.
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
        batch.meanwhile()
        logits: Tensor = self.model(
            input_ids=tokens[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=keep,
            apiary_batch=batch,
        ).logits
        return logits[0]


def cached_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    apiary_batch: Batch,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers' own modules call.

    Args:
        module: the attention layer; its `layer_idx` says which layer of the caches.
        query: `[1, query_heads, rows, head_dim]`, rotated.
        key: `[1, kv_heads, rows, head_dim]`, rotated.
        value: `[1, kv_heads, rows, head_dim]`.
        attention_mask: none; which rows see what is in `apiary_batch`.
        scaling: of the logits; default `head_dim ** -0.5`.
        apiary_batch: where the rows belong.

    Returns:
        `[1, rows, query_heads, head_dim]` and no weights.
    """
    layer = module.layer_idx
    if not isinstance(layer, int):
        raise TypeError("attention layers must be numbered")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    queries, keys, values = (part[0].transpose(0, 1) for part in (query, key, value))
    return _OPERATIONS.attend(layer, queries, keys, values, scale, apiary_batch)[None], None


AttentionInterface.register(NAME, cached_attention)
