"""Which models a `BuzzCache` serves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol
from weakref import WeakSet

import torch
from transformers import DynamicCache, PreTrainedModel

from buzz.cache import Cache
from buzz.hf.attention import FORMER
from buzz.hf.errors import UnsupportedError
from buzz.rotary import Rotary

_adopted: WeakSet[PreTrainedModel] = WeakSet()  # models that passed the check


class Trial(Protocol):
    """A `BuzzCache` for a check."""

    @property
    def rows(self) -> Sequence[Cache]:
        """The cache of each row."""


def rotary_of(model: PreTrainedModel) -> Rotary:
    """The model's rotary embedding.

    Raises:
        UnsupportedError: the configuration shows already that it cannot be served.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(
            f"a model of transformers is needed, not {type(model).__name__}; pass the model itself, without "
            "torch.compile or another wrapper around it"
        )
    config, name = model.config, type(model).__name__
    if config.is_encoder_decoder or config.get_text_config(decoder=True) is not config:
        raise UnsupportedError(f"{name} is not a plain decoder; only those are served")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise UnsupportedError(
            f"{name} has layers of {', '.join(sorted(kinds))}; only full attention is served"
        )
    if (window := getattr(config, "sliding_window", None)) is not None:
        raise UnsupportedError(
            f"{name} attends to the last {window} tokens only, and just full attention is served; for "
            f"sequences of up to {window} tokens both are the same: load it with "
            "from_pretrained(..., sliding_window=None)"
        )
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedError(f"{name} has attention of its own, which cannot be replaced")
    inv_freq = getattr(getattr(model.base_model, "rotary_emb", None), "inv_freq", None)
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if inv_freq is None or not getattr(config, "max_position_embeddings", None):
        raise UnsupportedError(f"{name} has no rotary positions that could be moved")
    if kind in {"dynamic", "longrope"}:
        raise UnsupportedError(f"{name} has rotary positions of type {kind}, which change with the length")
    if model.training:
        raise UnsupportedError("the model is in training mode; call model.eval() first")
    return Rotary(inv_freq.detach().clone(), config.max_position_embeddings)


def adopt(model: PreTrainedModel, trial: Trial) -> None:
    """Switch the model to our attention, and when it is met first check it with `trial`, which keeps all.

    Raises:
        UnsupportedError: it cannot be served; it is left as it was.
    """
    former = model.config._attn_implementation
    if former not in FORMER:
        if former not in FORMER.values():
            raise UnsupportedError(
                f"the model's attention implementation is {former}; set_attn_implementation('sdpa') first"
            )
        model.set_attn_implementation(f"buzz|{former}")
    if model in _adopted:
        return
    try:
        _check(model, trial)
    except BaseException:
        model.set_attn_implementation(former)
        raise
    _adopted.add(model)


@torch.no_grad()
def _check(model: PreTrainedModel, cache: Trial) -> None:
    """Compare the output and keys of a few tokens with the model's own. Each part has its tokens rotated to
    other positions, which shows attention, layers and conventions of rotation that are not as ours."""
    plain = DynamicCache()
    tokens = (torch.arange(1, 9, device=model.device) % model.config.vocab_size)[None]
    places = torch.arange(8, device=model.device)[None]
    theirs = model(tokens, past_key_values=plain, use_cache=True)[0]  # logits, or hidden states
    parts = [(slice(0, 5), 40), (slice(5, 7), 3), (slice(7, 8), 90)]
    try:
        ours = [
            model(
                tokens[:, part], position_ids=places[:, part] + shift, past_key_values=cache, use_cache=True
            )[0]
            for part, shift in parts
        ]
    except RuntimeError as error:  # shapes that do not fit
        raise UnsupportedError(f"{type(model).__name__} cannot run over a BuzzCache: {error}") from error
    held = cache.rows[0].buffers.keys[:, :, :8]
    pairs = [(torch.cat(ours, dim=1), theirs)]
    pairs += [(mine, keys[0]) for mine, (keys, *_) in zip(held, plain, strict=True)]
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    for mine, own in pairs:
        if not torch.allclose(mine.float(), own.float(), atol=tolerance * float(own.abs().max()), rtol=0):
            raise UnsupportedError(
                f"{type(model).__name__} attends or rotates in a way that is not served: a few tokens over a "
                f"full cache differ by {float((mine - own).abs().max()):.3g} from the model's own"
            )
