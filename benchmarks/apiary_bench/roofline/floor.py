"""The floor of a step: the time that its operations take at the machine's ceilings.

An operation is a linear layer, a layer's attention, the recording of its scores, the embedding, or sampling.
Its floor is max(bytes / copy bandwidth, arithmetic / peak of matrix products); a step's floor is their sum.
What need not be an operation of its own has none: norms, rotations and activations can be part of their
neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Self

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from apiary_bench.roofline.ceilings import Ceilings
from apiary_bench.roofline.part import Part
from apiary_server.sessions.pool import Geometry
from buzz import Policy
from buzz.quant import GROUP

_SCORE_BYTES = 4
_SCALE_BYTES = 4  # of an int8 weight's output channel, or of an int8 entry
_GRID_BYTES = 4  # minimum and step of a group of quantised channels, float16 both
_FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer, or several that read the same rows: rows of `inputs` to rows of `outputs`."""

    inputs: int
    outputs: int
    bias: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What a step computes.

    Attributes:
        linears: all linear layers, the head among them.
        hidden: of an embedding.
        vocabulary: of the logits.
        query_heads: of a layer.
        geometry: of the cache.
        dtype: of what lies between the layers.
        int8: whether weights are.
        stored: bytes of a weight where it is kept, without the scales of int8.
    """

    linears: tuple[Linear, ...]
    hidden: int
    vocabulary: int
    query_heads: int
    geometry: Geometry
    dtype: torch.dtype
    int8: bool
    stored: float

    @classmethod
    def of(
        cls, path: Path, geometry: Geometry, dtype: torch.dtype, *, int8: bool, kept: int | None = None
    ) -> Self:
        """The model in a Hugging Face directory; its weights are not read.

        Args:
            path: the directory.
            geometry: of the cache.
            dtype: as above.
            int8: as above.
            kept: bytes of all linear layers' weights where they are not int8; None: as `dtype` has it.
        """
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        linears = tuple(_linears(model))
        weights = sum(layer.inputs * layer.outputs for layer in linears)
        return cls(
            linears=linears,
            hidden=config.hidden_size,
            vocabulary=config.vocab_size,
            query_heads=config.num_attention_heads,
            geometry=geometry,
            dtype=dtype,
            int8=int8,
            stored=1 if int8 else dtype.itemsize if kept is None else kept / weights,
        )


def _linears(model: nn.Module) -> Iterator[Linear]:
    """Queries, keys and values count as one layer, and so do gate and up: they read the same rows."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for _, same in groupby(found, key=lambda each: _product(each[0])):
        modules = [module for _, module in same]
        yield Linear(
            modules[0].in_features,
            sum(module.out_features for module in modules),
            modules[0].bias is not None,
        )


def _product(name: str) -> str:
    parent, _, last = name.rpartition(".")
    return f"{parent}.{_FUSED.get(last, last)}"


@dataclass(frozen=True, slots=True)
class Load:
    """What a decoding step works on; means over several steps, or of one.

    Attributes:
        rows: tokens, of a session each.
        entries: to which they attend, themselves included: the sum over the sessions, of one layer and head.
        packed: how many of those are quantised.
    """

    rows: float
    entries: float
    packed: float


@dataclass(frozen=True, slots=True)
class Operation:
    """Bytes that have to be read and written, and arithmetic operations, of which an addition and a
    multiplication are two; `int8` says of which kind."""

    part: Part
    bytes: float
    operations: float
    int8: bool = False

    def seconds(self, ceilings: Ceilings) -> float:
        """Its floor."""
        peak = ceilings.gemm if not self.int8 or ceilings.int8 is None else ceilings.int8
        return max(self.bytes / ceilings.copy, self.operations / peak)


def operations(model: Model, policy: Policy, load: Load) -> Iterator[Operation]:
    """The operations of one decoding step in which every row asks for logits.

    - Linear layers: the weights in the precision in which they are stored, with their scales and bias; rows
      in and out; each activation multiplied once.
    - Attention, of each layer: keys and values read, quantised ones with their minima and steps; new ones
      written; queries and outputs.
    - Scores, of each layer: each state of each entry read and written.
    - Embedding: rows read and written. Sampling: logits read once.
    """
    item = model.dtype.itemsize
    for layer in model.linears:
        yield _linear(model, layer, load.rows)
    for _ in range(model.geometry.layers):
        yield _attention(model, policy, load)
        if policy.states:
            yield _scores(model, policy, load)
    yield Operation(Part.EMBEDDING, 2 * load.rows * model.hidden * item, 0)
    yield Operation(Part.SAMPLING, load.rows * model.vocabulary * item, load.rows * model.vocabulary)


def _linear(model: Model, layer: Linear, rows: float) -> Operation:
    item, size = model.dtype.itemsize, layer.inputs * layer.outputs
    weights = size * model.stored + (layer.outputs * _SCALE_BYTES if model.int8 else 0)
    bias = layer.outputs * item if layer.bias else 0
    activations = rows * (layer.inputs + layer.outputs) * item
    arithmetic = 2 * rows * size
    return Operation(Part.LINEAR, weights + bias + activations, arithmetic, model.int8)


def _attention(model: Model, policy: Policy, load: Load) -> Operation:
    shape, heads = model.geometry, model.query_heads
    scale = _SCALE_BYTES if shape.dtype == torch.int8 else 0
    dense = shape.head_dim * shape.dtype.itemsize + scale
    packed = shape.head_dim * (policy.kivi or 0) / 8 + shape.head_dim // GROUP * _GRID_BYTES
    cached = (load.entries - load.packed + load.rows) * dense + load.packed * packed
    ends = 2 * load.rows * heads * shape.head_dim * model.dtype.itemsize
    arithmetic = 4 * load.entries * heads * shape.head_dim
    return Operation(Part.ATTENTION, 2 * shape.kv_heads * cached + ends, arithmetic)


def _scores(model: Model, policy: Policy, load: Load) -> Operation:
    recorded = len(policy.states) * load.entries
    written = 2 * recorded * model.geometry.kv_heads * _SCORE_BYTES
    return Operation(Part.SCORES, written, recorded * model.query_heads)


def floors(operations: Iterable[Operation], ceilings: Ceilings) -> dict[Part, float]:
    """Seconds of each part that has a floor."""
    found: dict[Part, float] = {}
    for operation in operations:
        found[operation.part] = found.get(operation.part, 0.0) + operation.seconds(ceilings)
    return found
