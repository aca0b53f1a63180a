"""Attention and mask functions under the names to which a `BuzzCache` switches its model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from buzz.hf.errors import UnsupportedError

FORMER = {"buzz|sdpa": "sdpa", "buzz|eager": "eager"}  # named as transformers names paged|eager

_UNSERVED = ("sliding_window", "softcap", "s_aux", "position_bias")  # what attention may be asked for
_EAGER = "eager_attention_forward"  # what every model's file calls it


class Keys(Tensor):
    """A layer's new keys, on their way from `BuzzCache.update` to the attention function.

    Attributes:
        plain: the keys, to compute with.
        attend: `BuzzCache.attend` of the cache that they come from.

    Raises:
        UnsupportedError: anyone but our attention function computes with them.
    """

    plain: Tensor
    attend: Callable[..., Tensor]

    @classmethod
    def __torch_function__(cls, *_: Any) -> NoReturn:
        raise UnsupportedError(
            "the cache was made for another model: BuzzCache(model, ...); or else this model does more with "
            "its keys than attend to them, which is not served"
        )


class PaddingOnly(int):
    """The key length of a mask for a `BuzzCache`."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    former: str,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function: over a `BuzzCache` if the keys come from one, else the former one."""
    if not isinstance(key, Keys):
        attend = _function(module, former)
        return attend(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    asked = [name for name in _UNSERVED if kwargs.get(name) is not None]
    asked += [name for name in ("dropout", "output_attentions") if kwargs.get(name)]
    if asked:
        raise UnsupportedError(f"the model's attention asks for {', '.join(asked)}, which is not served")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    positions = kwargs.get("position_ids")
    return key.attend(module, query, key.plain, value, attention_mask, positions, scale), None


def _mask(*, former: str, kv_length: int, attention_mask: Tensor | None, **kwargs: Any) -> Any:
    """transformers' mask function: the padding mask as it is for a `BuzzCache`, else the former one's."""
    if not isinstance(kv_length, PaddingOnly):
        make = AttentionMaskInterface()[former]
        return make(kv_length=kv_length, attention_mask=attention_mask, **kwargs)
    if kwargs.get("mask_function") is not causal_mask_function:
        raise UnsupportedError("the model masks more than the future and padding, which is not served")
    return attention_mask


def _function(module: nn.Module, former: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The former attention function; `eager` is that of the file in which the module is written."""
    if former == "eager":
        files = (vars(sys.modules[base.__module__]) for base in type(module).__mro__)
        found = next((file[_EAGER] for file in files if _EAGER in file), None)
    else:
        found = AttentionInterface()[former]
    if found is None:
        raise UnsupportedError(
            f"{type(module).__name__} has no function for eager attention; load it with sdpa"
        )
    function: Callable[..., tuple[Tensor, Tensor | None]] = found
    return function


for _name, _former in FORMER.items():
    AttentionInterface.register(_name, partial(_attention, former=_former))
    AttentionMaskInterface.register(_name, partial(_mask, former=_former))
