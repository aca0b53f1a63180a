"""The cache for transformers."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Sequence
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn
from transformers import Cache as TransformersCache
from transformers import PreTrainedModel

from buzz.batch import Batch, Prompt, Step
from buzz.cache import Cache
from buzz.hf.attention import FORMER, Keys, PaddingOnly
from buzz.hf.errors import UnsupportedError
from buzz.hf.support import adopt, rotary_of
from buzz.policies.full import Full
from buzz.policy import Policy, PolicyError
from buzz.quant import GROUP
from buzz.registry import parse


class BuzzCache(TransformersCache):
    """A bounded cache for `generate` and for a model's own forward calls.

        cache = BuzzCache(model, "buzz(window=300)")
        ids = model.generate(**inputs, past_key_values=cache)

    For the next turn give the whole history and the same cache: only what is new is computed. Each row of
    a batch is a `buzz.Cache` of its own, and tokens that the attention mask leaves out (padding) are not
    stored, wherever it stands; without a mask all new tokens are real. A forward call is one segment: a
    prompt, or one token; `prefill_chunk_size=` cuts a prompt that is longer than the model into several.
    Greedy decoding, sampling and beam search are served. Keys and queries arrive rotated to the positions
    that the model counted, and are moved to the policy's by the difference, so a conversation may be longer
    than the model, and where a call's `position_ids` start does not matter: its tokens follow what the cache
    has seen. Within a call they must count a row's tokens by one, padding left out. (transformers takes
    angles in float32, so what it counted blurs with millions of tokens: for the default model a mean KL
    divergence of 6e-5 after one million.) A cache serves one forward call at a time; any number of caches
    may share a model.

    The model's attention implementation becomes `buzz|sdpa` or `buzz|eager`, which does what the former one
    did wherever no `BuzzCache` is given; `model.set_attn_implementation("sdpa")` takes that back. A model's
    first cache compares a few tokens with the model's own attention and positions.

    Memory is taken as entries come: at rest at most `bound + 1` entries a row, each of `layers * kv_heads *
    (2 * head_dim * itemsize + 4 + 4 * states)` bytes. With `kivi`, `residual + 32` of them have keys and
    values of that size, and `bound - residual` such of `2 * head_dim * (kivi + 1) / 8` bytes. A forward call
    whose tokens do not fit there runs in a workspace with room for the entries held and its tokens, which is
    freed when it ends.

    Args:
        model: a decoder with rotary positions and full attention in every layer, in `eval()` mode; with or
            without its head.
        policy: a policy, or its specification.

    Attributes:
        policy: the policy, resolved for the model.

    Raises:
        UnsupportedError: the model cannot be served. Later, from a forward call: gradients, a model
            compiled to one graph, another model, another batch size, a mask that is no padding mask or
            contradicts what was seen, positions that jump, more tokens than there are positions left,
            assisted decoding.
        PolicyError: the policy makes no sense, or not for this model. Later: it is full, and never evicts.
    """

    def __init__(self, model: PreTrainedModel, policy: str | Policy) -> None:
        super().__init__(layers=[])
        rule = parse(policy) if isinstance(policy, str) else policy
        if not isinstance(rule, Policy):
            raise PolicyError(
                f"a policy, or a specification such as 'h2o(heavy=100)', is needed, not {rule!r}"
            )
        self._rotary = rotary_of(model)
        self._config = model.config
        self._decoder = weakref.ref(model.base_model)  # a cache keeps no model alive
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
        trial = copy.copy(self)
        trial.policy = Full().resolve(self._rotary.max_positions)
        adopt(model, trial)

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
        if self._config._attn_implementation not in FORMER:
            raise UnsupportedError(
                f"the model's attention was switched to {self._config._attn_implementation} after this cache "
                "was made; switch it back: model.set_attn_implementation('buzz|sdpa')"
            )
        if layer_idx != self._next:
            raise UnsupportedError(
                f"layer {layer_idx} came where layer {self._next} was due: an earlier forward call stopped "
                "halfway (reset() the cache then), or the model does not run its layers in order"
            )
        keys = key_states.as_subclass(Keys)
        keys.plain, keys.attend = key_states, self.attend
        return keys, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen in each row, padding included: what `generate` cuts from the history."""
        return self._columns

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """A mask's key length and offset; the length's type asks for the padding mask as it is."""
        return PaddingOnly(self._columns + query_length), 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """The most tokens of a row; -1: any number."""
        return -1 if self.policy.evicts else self.policy.bound

    def reset(self) -> None:
        """Forget everything and free the memory."""
        self._batch: Batch | None = None
        self._call: Step | Prompt | None = None  # the forward call that is under way
        self._next = 0  # the layer that is due in it
        self._columns = 0

    def batch_select_indices(self, indices: Tensor | Sequence[int]) -> None:
        """Keep these rows in this order; a row may come more than once.

        Raises:
            IndexError: there is no such row.
        """
        if self._batch is not None:
            rows = torch.arange(len(self.rows))[torch.as_tensor(indices).cpu()]
            self._batch = self._batch.select(rows.tolist())

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

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        position_ids: Tensor | None,
        scale: float,
    ) -> Tensor:
        """What the attention function calls: the attention of the layer that is due.

        Args:
            module: the model's attention module.
            query: `[B, query_heads, T, head_dim]`, rotated to `position_ids`.
            key: `[B, kv_heads, T, head_dim]`, rotated likewise.
            value: the same.
            mask: the padding mask, `[B, tokens seen and new]`; None where there is no padding.
            position_ids: integer `[B, T]` or `[1, T]`, as the model counted.
            scale: factor on the logits.

        Returns:
            `[B, T, query_heads, head_dim]`.

        Raises:
            UnsupportedError, PolicyError: see the class.
        """
        if self._call is None:
            self._check_model(module, query, key, value)
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
        if count > 1:
            _check_positions(position_ids, real)
        self._check_room(real.sum(dim=1).tolist())
        if self._batch is None:
            self._batch = Batch(self.policy, self._rotary, self._depth, key)
        return self._batch.begin(real, position_ids.expand(rows, count))

    def _check_model(self, module: nn.Module, *states: Tensor) -> None:
        """Refuse the attention of another model, and gradients: entries are stored without their graph."""
        decoder = self._decoder()
        if decoder is None or module not in decoder.modules():  # found early: attention of the first layer
            raise UnsupportedError("the cache was made for another model: BuzzCache(model, ...)")
        if torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in itertools.chain(states, decoder.parameters())
        ):
            raise UnsupportedError("a BuzzCache has no gradients; call the model under torch.no_grad()")

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


def _check_positions(position_ids: Tensor, real: Tensor) -> None:
    """Refuse positions that do not count each row's real tokens, since the cache counts them so."""
    ahead = position_ids - real.cumsum(dim=1)  # the same for all tokens of a row that is counted by one
    first = ahead.gather(1, real.int().argmax(dim=1, keepdim=True))
    if bool(((ahead != first) & real).any()):
        raise UnsupportedError(
            "the position_ids of a row's tokens do not count up by one: jumps and several sequences in a row "
            "are not served, and padding between tokens is not counted: position_ids=mask.cumsum(1) - 1"
        )
