"""The Llama family's decoder over packed rows: transformers' weights in far fewer operations.

Llama, Mistral, Qwen2, Qwen3 and Gemma have one structure: norm, attention, norm, gated MLP, with biases and
norms of heads here and there. A model is taken by that structure, and the loader compares what comes out with
the model's own; so a stranger that only looks alike is served by its own modules.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from apiary_server.errors import ApiaryError
from apiary_server.model.attention import Batch
from apiary_server.model.operations import Linear, Norm, Operations

_BASE = {"embed_tokens", "layers", "norm", "rotary_emb"}
_LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class ForeignStructure(ApiaryError):
    """A model that is not of the Llama family; the message says by what."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer: its queries, keys and values are one product, and so are its gate and up projections."""

    attention_norm: Norm
    qkv: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    output: Linear
    mlp_norm: Norm
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class Decoder:
    """A model's weights, as a backend wants them.

    Attributes:
        embed: token ids `[T]` to rows `[T, hidden]`.
        layers: in order.
        norm: after the last layer.
        head: rows to logits.
        activation: of the gate.
        query_heads, kv_heads, head_dim: of attention.
        scale: of the attention's logits.
        inv_freq: of the rotary embedding, `[head_dim / 2]` radians per position.
        rotary_scale: of its cosines and sines.
        operations: how a backend does what lies between the products.
    """

    embed: Callable[[Tensor], Tensor]
    layers: Sequence[Layer]
    norm: Norm
    head: Linear
    activation: Callable[[Tensor], Tensor]
    query_heads: int
    kv_heads: int
    head_dim: int
    scale: float
    inv_freq: Tensor
    rotary_scale: float
    operations: Operations

    @classmethod
    def of(cls, model: PreTrainedModel, operations: Operations) -> Self:
        """Take the weights of a model.

        Args:
            model: it is not changed.
            operations: of the backend, which makes linear layers of the weights.

        Raises:
            ForeignStructure: it has layers of another kind.
        """
        base: Any = model.base_model
        layers: Sequence[Any] = getattr(base, "layers", ())
        for layer in layers:
            _check(layer)
        if not layers or set(_names(base)) != _BASE:
            raise ForeignStructure(f"it has {', '.join(sorted(_names(base)))}")
        attention = layers[0].self_attn
        head_dim, rotary = int(attention.head_dim), base.rotary_emb
        if 2 * len(rotary.inv_freq) != head_dim:
            raise ForeignStructure("some dimensions are not rotated")
        return cls(
            # a copy: what is left of the model would keep all of the file in memory that it is mapped from
            embed=copy.deepcopy(model.get_input_embeddings()),
            layers=[_layer(layer, operations) for layer in layers],
            norm=_norm(base.norm),
            head=_joined(operations, [model.get_output_embeddings()]),
            activation=layers[0].mlp.act_fn,
            query_heads=model.config.num_attention_heads,
            kv_heads=attention.k_proj.out_features // head_dim,
            head_dim=head_dim,
            scale=float(attention.scaling),
            inv_freq=rotary.inv_freq.detach().clone().float(),
            rotary_scale=float(getattr(rotary, "attention_scaling", 1.0)),
            operations=operations,
        )

    def forward(self, tokens: Tensor, positions: Tensor, keep: Tensor, batch: Batch) -> Tensor:
        """As `Backend.forward`."""
        batch.meanwhile()
        return self.head(self.normed(self.embed(tokens), *self.turns(positions), keep, batch))

    def normed(self, rows: Tensor, cos: Tensor, sin: Tensor, keep: Tensor, batch: Batch) -> Tensor:
        """All that comes after the embedding and `turns`, of which these are, `[T, hidden]` and
        `[T, 1, head_dim / 2]`, and before the head: `[R, hidden]`. The rows are overwritten."""
        return self.operations.add_norm(self.norm, *self._layers(rows, cos, sin, keep, batch))

    def hidden(self, tokens: Tensor, positions: Tensor, batch: Batch) -> Tensor:
        """What the layers make of tokens: `[T, hidden]`."""
        rows, more = self._layers(self.embed(tokens), *self.turns(positions), None, batch)
        return rows if more is None else rows.add_(more)

    def logits(self, hidden: Tensor) -> Tensor:
        """`[R, hidden]` to `[R, vocab]`."""
        return self.head(self.operations.add_norm(self.norm, hidden, None))

    def turns(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[T, 1, head_dim / 2]`, as transformers computes them: in float32."""
        angles = positions[:, None, None].float() * self.inv_freq
        dtype = self.norm.weight.dtype
        return (angles.cos() * self.rotary_scale).to(dtype), (angles.sin() * self.rotary_scale).to(dtype)

    def _layers(
        self, rows: Tensor, cos: Tensor, sin: Tensor, keep: Tensor | None, batch: Batch
    ) -> tuple[Tensor, Tensor | None]:
        """Rows of the residual stream, and what is still to be added to them: of all tokens, or of those that
        are kept. The others need no more than to be in the last layer's cache."""
        do, heads, kv, count = self.operations, self.query_heads, self.kv_heads, len(rows)
        more = None
        for number, layer in enumerate(self.layers):
            qkv = layer.qkv(do.add_norm(layer.attention_norm, rows, more))
            qkv = qkv.view(count, -1, self.head_dim)
            if layer.q_norm is not None and layer.k_norm is not None:
                queries, keys = qkv[:, :heads], qkv[:, heads : heads + kv]
                qk = torch.cat([layer.q_norm(queries), layer.k_norm(keys)], dim=1)
            else:
                qk = qkv[:, : heads + kv]
            queries, keys = do.rotate(qk, cos, sin).split((heads, kv), dim=1)
            values = qkv[:, heads + kv :]
            attended = do.attend(number, queries, keys, values, self.scale, batch).flatten(1)
            if keep is not None and number == len(self.layers) - 1:
                rows, attended = do.take(rows, keep), do.take(attended, keep)
            more = layer.output(attended)
            gate_up = layer.gate_up(do.add_norm(layer.mlp_norm, rows, more))
            more = layer.down(do.gated(gate_up, self.activation))
        return rows, more


def _check(layer: nn.Module) -> None:
    children = dict(layer.named_children())
    parts = {"attention": _names(children.get("self_attn")), "mlp": _names(children.get("mlp"))}
    if set(children) != _LAYER:
        raise ForeignStructure(f"layers have {', '.join(sorted(children))}")
    if parts["attention"] - _HEAD_NORMS != {*_PROJECTIONS, "o_proj"} or parts["mlp"] != _MLP:
        raise ForeignStructure(f"layers have {', '.join(sorted(parts['attention'] | parts['mlp']))}")


def _names(module: nn.Module | None) -> set[str]:
    return set() if module is None else {name for name, _ in module.named_children()}


def _layer(layer: Any, operations: Operations) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    q_norm, k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    return Layer(
        attention_norm=_norm(layer.input_layernorm),
        qkv=_joined(operations, [getattr(attention, name) for name in _PROJECTIONS]),
        q_norm=None if q_norm is None else _norm(q_norm),
        k_norm=None if k_norm is None else _norm(k_norm),
        output=_joined(operations, [attention.o_proj]),
        mlp_norm=_norm(layer.post_attention_layernorm),
        gate_up=_joined(operations, [mlp.gate_proj, mlp.up_proj]),
        down=_joined(operations, [mlp.down_proj]),
    )


def _joined(operations: Operations, modules: Sequence[Any]) -> Linear:
    """One product for several of the same rows."""
    biases = [module.bias for module in modules]
    bias = None
    if any(each is not None for each in biases):
        bias = torch.cat(list(_filled(modules)))
    return operations.linear(torch.cat([module.weight.detach() for module in modules]), bias)


def _filled(modules: Sequence[Any]) -> Iterator[Tensor]:
    for module in modules:
        weight, bias = module.weight, module.bias
        yield weight.new_zeros(len(weight)) if bias is None else bias.detach()


def _eps(module: nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps"):
        if hasattr(module, name):
            return float(getattr(module, name))
    return None


def _norm(module: nn.Module) -> Norm:
    """The same as a module of transformers: some keep the weight less one."""
    weight, eps = getattr(module, "weight", None), _eps(module)
    if isinstance(weight, Tensor) and eps is not None:
        sample = torch.linspace(-3, 3, 2 * len(weight)).view(2, -1).to(weight)
        for scale in (weight, 1 + weight):
            norm = Norm(scale.detach().clone(), eps)
            if torch.allclose(norm(sample), module(sample), rtol=1e-2, atol=1e-3):
                return norm
    raise ForeignStructure(f"{type(module).__name__} is another kind of normalisation")
