"""The drop-in for transformers: `model.generate(..., past_key_values=BuzzCache(model, "buzz"))`.

A model of transformers hands each layer's new keys and values to its cache (`Cache.update`), and what it
gets back to its attention function. Both are its public places for extensions: `BuzzCache.update` returns
the keys as a tensor that knows its cache, and the attention function that the model is switched to
(`buzz|sdpa`: ours over the former one) attends in that cache, or, given any other keys, calls the former
function. So calls with and without a `BuzzCache`, in turn or in threads, never touch each other.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn, Self
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers import Cache as TransformersCache
from transformers.masking_utils import causal_mask_function

from buzz.batch import Batch, Prompt, Step
from buzz.cache import Cache
from buzz.policies.full import Full
from buzz.policy import Policy, PolicyError
from buzz.quant import GROUP
from buzz.registry import parse
from buzz.rotary import Rotary

_FORMER = {"buzz|sdpa": "sdpa", "buzz|eager": "eager"}  # named as transformers names paged|eager
_UNSERVED = ("sliding_window", "softcap", "s_aux", "position_bias")  # what attention may be asked for
_EAGER = "eager_attention_forward"  # what every model's file calls it
_adopted: WeakSet[PreTrainedModel] = WeakSet()  # models that passed the check


class UnsupportedError(ValueError):
    """A model, or a way to use it, that a `BuzzCache` does not serve; the message says why and what to do."""


class BuzzCache(TransformersCache):
    """A bounded cache for `generate` and for a model's own forward calls.

        cache = BuzzCache(model, "buzz(window=300)")
        ids = model.generate(**inputs, past_key_values=cache)

    For the next turn give the whole history and the same cache: only what is new is computed. Each row of
    a batch is a `buzz.Cache` of its own, and tokens that the attention mask leaves out (padding) are not
    stored. A forward call is one segment: a prompt, or one token; `prefill_chunk_size=` cuts a prompt that
    is longer than the model into several. Greedy decoding, sampling and beam search are served. Keys and
    queries arrive rotated to the positions that the model counted, and are moved to the policy's by the
    difference, so a conversation may be longer than the model. (transformers takes angles in float32, so
    what it counted blurs with millions of tokens: for the default model a mean KL divergence of 6e-5 after
    one million.) A cache serves one forward call at a time; any number of caches may share a model.

    The model's attention implementation becomes `buzz|sdpa` or `buzz|eager`, which does what the former one
    did wherever no `BuzzCache` is given; `model.set_attn_implementation("sdpa")` takes that back. A model's
    first cache compares a few tokens with the model's own attention and positions.

    Memory is taken as entries come: at rest at most `bound + 1` entries a row, each of `layers * kv_heads *
    (2 * head_dim * itemsize + 4 + 4 * states)` bytes. With `kivi`, `residual + 32` of them have keys and
    values of that size, and `bound - residual` such of `2 * head_dim * (kivi + 1) / 8` bytes. A forward call
    whose tokens do not fit there runs in a workspace with room for the entries held and its tokens, which is
    freed when it ends.

    Args:
        model: a decoder with rotary positions and full attention in every layer, in `eval()` mode.
        policy: a policy, or its specification.

    Attributes:
        policy: the policy, resolved for the model.

    Raises:
        UnsupportedError: the model cannot be served. Later, from a forward call: gradients, a model
            compiled to one graph, another model, another batch size, a mask that is no padding mask or
            contradicts what was seen, more tokens than there are positions left, assisted decoding.
        PolicyError: the policy makes no sense, or not for this model. Later: it is full, and never evicts.
    """

    def __init__(self, model: PreTrainedModel, policy: str | Policy) -> None:
        super().__init__(layers=[])
        rule = parse(policy) if isinstance(policy, str) else policy
        self._rotary = _rotary_of(model)
        self._config = model.config
        self._depth: int = model.config.num_hidden_layers
        self.policy = rule.resolve(self._rotary.max_positions)
        head_dim = getattr(model.config, "head_dim", None) or (
            model.config.hidden_size // model.config.num_attention_heads
        )
        if self.policy.kivi is not None and head_dim % GROUP:
            raise UnsupportedError(
                f"{self.policy} quantises in groups of {GROUP} channels, and {type(model).__name__} has "
                f"heads of {head_dim}; use a policy without kivi"
            )
        self.reset()
        _adopt(model)

    @property
    def rows(self) -> Sequence[Cache]:
        """The cache of each row of the batch; none before the first forward call."""
        return () if self._batch is None else self._batch.caches

    @property
    def nbytes(self) -> int:
        """Bytes of the memory that it holds now."""
        return 0 if self._batch is None else self._batch.nbytes

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Send a layer's new keys and values, `[B, kv_heads, T, head_dim]`, on to the attention function.

        Raises:
            UnsupportedError: see the class.
        """
        if torch.compiler.is_compiling():
            raise UnsupportedError("a BuzzCache cannot be part of a model's graph; call it uncompiled")
        if self._config._attn_implementation not in _FORMER:
            raise UnsupportedError(
                f"the model's attention was switched to {self._config._attn_implementation} after this cache "
                "was made; switch it back: model.set_attn_implementation('buzz|sdpa')"
            )
        if layer_idx != self._next:
            raise UnsupportedError(
                f"layer {layer_idx} came where layer {self._next} was due: an earlier forward call stopped "
                "halfway (reset() the cache then), or the model does not run its layers in order"
            )
        if key_states.requires_grad:
            raise UnsupportedError("a BuzzCache has no gradients; call the model under torch.no_grad()")
        keys = key_states.as_subclass(_Keys)
        keys.cache = self
        return keys, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen in each row, padding included: what `generate` cuts from the history."""
        return self._columns

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """A mask's key length and offset; the length's type asks for the padding mask as it is."""
        return _PaddingOnly(self._columns + query_length), 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """The most tokens of a row; -1: any number."""
        return -1 if self.policy.evicts else self.policy.bound

    def reset(self) -> None:
        """Forget everything and free the memory."""
        self._batch: Batch | None = None
        self._call: Step | Prompt | None = None  # the forward call that is under way
        self._next = 0  # the layer that is due in it
        self._columns = 0

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows in this order; a row may come more than once."""
        if self._batch is not None:
            self._batch = self._batch.select(indices.tolist())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """What beam search calls `batch_select_indices`."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self.batch_select_indices(torch.arange(len(self.rows)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Not possible, since evicted entries do not come back.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError("a BuzzCache cannot be cropped: evicted entries do not come back")

    def activate_past_recording(self) -> NoReturn:
        """Not possible, and assisted decoding, which starts with it, is not either.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError("assisted decoding takes tokens back, which a BuzzCache cannot")

    @property
    def is_croppable(self) -> bool:
        """Never."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Whether it has been used since it was made or reset."""
        return self._batch is not None

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first forward call."""
        return len(self.rows) or -1

    def __len__(self) -> int:
        return self._depth

    def __repr__(self) -> str:
        return f"BuzzCache({self.policy}: {len(self.rows)} rows, {self._columns} tokens seen)"

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy for the same model, as to continue one prefix in several ways."""
        twin = copy.copy(self)
        twin.batch_select_indices(torch.arange(len(self.rows)))
        return twin

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        position_ids: Tensor | None,
        scale: float,
    ) -> Tensor:
        """The attention of the layer that is due: `[B, T, query_heads, head_dim]`."""
        if self._call is None:
            if getattr(module, "config", self._config) is not self._config:
                raise UnsupportedError("the cache was made for another model: BuzzCache(model, ...)")
            self._call = self._begin(key, value, mask, position_ids)
        layer, self._next = self._next, self._next + 1  # before what may fail, so that it is noticed
        output = self._call.attend(layer, query, key, value, scale)
        if self._next == self._depth:
            self._call.end()
            self._columns += key.shape[2]
            self._call, self._next = None, 0
        return output

    def _begin(
        self, key: Tensor, value: Tensor, mask: Tensor | None, position_ids: Tensor | None
    ) -> Step | Prompt:
        """Open the segments of a forward call, after checking it: a refusal changes nothing."""
        rows, _, count, _ = key.shape
        if value.shape != key.shape:
            raise UnsupportedError(
                f"keys and values must have one shape, not {list(key.shape)} and {list(value.shape)}"
            )
        if position_ids is None or position_ids.shape not in {(1, count), (rows, count)}:
            raise UnsupportedError("the model's attention is not told one position for each token")
        if self.rows and rows != len(self.rows):
            raise UnsupportedError(f"the cache holds a batch of {len(self.rows)}, and {rows} rows came")
        if mask is None:
            mask = torch.ones(rows, count, dtype=torch.bool)
        elif mask.shape != (rows, self._columns + count):
            raise UnsupportedError(
                f"the attention mask must be a padding mask over the {self._columns} tokens seen before and "
                f"the {count} new ones, of shape {[rows, self._columns + count]}, not {list(mask.shape)}"
            )
        else:
            before = mask[:, :-count].sum(dim=1).tolist()
            for row, (cache, tokens) in enumerate(zip(self.rows, before, strict=False)):
                if tokens != cache.seen:
                    raise UnsupportedError(
                        f"the attention mask has {tokens} earlier tokens in row {row}, where the cache has "
                        f"seen {cache.seen}: what was seen stays (the padding of a finished row, too)"
                    )
        real = mask[:, -count:].to(key.device, torch.bool)
        self._check_room(real.sum(dim=1).tolist())
        if self._batch is None:
            self._batch = Batch(self.policy, self._rotary, self._depth, key)
        return self._batch.begin(real, position_ids.expand(rows, count))

    def _check_room(self, counts: list[int]) -> None:
        held = [cache.n for cache in self.rows] or [0] * len(counts)
        need = max(n + count for n, count in zip(held, counts, strict=True))
        if not self.policy.evicts and need > self.policy.bound:
            raise PolicyError(f"{self.policy} is full, {need} entries do not fit; use a policy that evicts")
        if need > self._rotary.max_positions:
            left = self._rotary.max_positions - self.policy.bound
            raise UnsupportedError(
                f"{need} entries, held and new, exceed the model's {self._rotary.max_positions} positions; "
                f"cut the prompt: generate(..., prefill_chunk_size={left})"
            )


class _Keys(Tensor):
    """A layer's new keys, on their way from `BuzzCache.update` to the attention function."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    cache: BuzzCache


class _PaddingOnly(int):
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
    if not isinstance(key, _Keys):
        attend = _function(module, former)
        return attend(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    asked = [name for name in _UNSERVED if kwargs.get(name) is not None]
    asked += [name for name in ("dropout", "output_attentions") if kwargs.get(name)]
    if asked:
        raise UnsupportedError(f"the model's attention asks for {', '.join(asked)}, which is not served")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    positions = kwargs.get("position_ids")
    plain = key.as_subclass(Tensor)
    return key.cache._attend(module, query, plain, value, attention_mask, positions, scale), None


def _mask(*, former: str, kv_length: int, attention_mask: Tensor | None, **kwargs: Any) -> Any:
    """transformers' mask function: the padding mask as it is for a `BuzzCache`, else the former one's."""
    if not isinstance(kv_length, _PaddingOnly):
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


for _name, _former in _FORMER.items():
    AttentionInterface.register(_name, partial(_attention, former=_former))
    AttentionMaskInterface.register(_name, partial(_mask, former=_former))


def _rotary_of(model: PreTrainedModel) -> Rotary:
    """The model's rotary embedding, unless the configuration shows already that it cannot be served."""
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(f"a model of transformers is needed, not a {type(model).__name__}")
    config, name = model.config, type(model).__name__
    if config.is_encoder_decoder or config.get_text_config(decoder=True) is not config:
        raise UnsupportedError(f"{name} is not a plain decoder; only those are served")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if getattr(config, "sliding_window", None) is not None:
        kinds.add(f"sliding_attention over {config.sliding_window} tokens")
    if kinds != {"full_attention"}:
        raise UnsupportedError(
            f"{name} has layers of {', '.join(sorted(kinds))}; only full attention is served"
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


def _adopt(model: PreTrainedModel) -> None:
    """Switch the model to our attention, and check it when it is met first."""
    former = model.config._attn_implementation
    if former not in _FORMER:
        if former not in _FORMER.values():
            raise UnsupportedError(
                f"the model's attention implementation is {former}; set_attn_implementation('sdpa') first"
            )
        model.set_attn_implementation(f"buzz|{former}")
    if model in _adopted:
        return
    _adopted.add(model)  # now, since the check makes a cache
    try:
        _check(model)
    except BaseException:
        _adopted.discard(model)
        model.set_attn_implementation(former)
        raise


@torch.no_grad()
def _check(model: PreTrainedModel) -> None:
    """Compare the logits and keys of a few tokens with the model's own. Each part has its tokens rotated to
    other positions, which shows attention, layers and conventions of rotation that are not as ours."""
    cache, plain = BuzzCache(model, Full()), DynamicCache()
    tokens = (torch.arange(1, 9, device=model.device) % model.config.vocab_size)[None]
    places = torch.arange(8, device=model.device)[None]
    theirs = model(tokens, past_key_values=plain, use_cache=True).logits
    parts = [(slice(0, 5), 40), (slice(5, 7), 3), (slice(7, 8), 90)]
    try:
        ours = [
            model(
                tokens[:, part], position_ids=places[:, part] + shift, past_key_values=cache, use_cache=True
            )
            for part, shift in parts
        ]
    except RuntimeError as error:  # shapes that do not fit
        raise UnsupportedError(f"{type(model).__name__} cannot run over a BuzzCache: {error}") from error
    held = cache.rows[0].buffers.keys[:, :, :8]
    pairs = [(torch.cat([part.logits for part in ours], dim=1), theirs)]
    pairs += [(mine, keys[0]) for mine, (keys, *_) in zip(held, plain, strict=True)]
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    for mine, own in pairs:
        if not torch.allclose(mine.float(), own.float(), atol=tolerance * float(own.abs().max()), rtol=0):
            raise UnsupportedError(
                f"{type(model).__name__} attends or rotates in a way that is not served: a few tokens over a "
                f"full cache differ by {float((mine - own).abs().max()):.3g} from the model's own"
            )
