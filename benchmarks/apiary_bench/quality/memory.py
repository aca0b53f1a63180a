"""What a policy's cache holds over a run, from counts alone: the model is never asked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from apiary_server.sessions.pool import Geometry
from buzz import Buffers, Policy, View
from buzz.compaction import compact, due

_STATE_BYTES = 4


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of tokens, at the end of which compaction is considered: a prompt, or a generated token.

    Attributes:
        tokens: how many.
        readers: scored queries that then read the cache as this segment left it.
    """

    tokens: int
    readers: int


Trace = tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Footprint:
    """Memory of one cache, all layers and heads, over a trace.

    Attributes:
        entries: held at rest by each head and layer, averaged over the scored queries that read them.
        bytes: the same in bytes: keys, values, positions and the policy's states.
        highest: the most bytes at rest that a scored query reads.
        peak_bytes: the most at any time: all entries before a compaction, the workspace's included, and
            beside a prompt in the workspace its survivors in the slot to which they move.
    """

    entries: float
    bytes: float
    highest: int
    peak_bytes: int


def generation(prompt: int, output: int) -> Trace:
    """A prompt, and `output` tokens each of which is fed back; the memory is read by those queries."""
    return (Segment(prompt, 1), *(Segment(1, 1) for _ in range(output - 1)), Segment(1, 0))


def plain_bytes(entries: float, geometry: Geometry) -> float:
    """What `entries` entries a head and layer take without states and unquantised."""
    return entries * _tensor_bytes(1, 0, None, geometry)


def held_bytes(policy: Policy, n: int, packed: int, geometry: Geometry) -> int:
    """What a cache of `n` entries a head and layer takes under `policy`, where it has quantised `packed` of
    them: keys, values, positions and states."""
    states = geometry.layers * geometry.kv_heads * n * _STATE_BYTES * len(policy.states)
    return _tensor_bytes(n, packed, policy.kivi if packed else None, geometry) + states


def _tensor_bytes(n: int, packed: int, bits: int | None, geometry: Geometry) -> int:
    g = geometry
    shapes = Buffers.shapes(g.layers, g.kv_heads, n, g.head_dim, g.dtype, bits, packed, n - packed)
    return sum(dtype.itemsize * math.prod(shape) for _, dtype, shape in shapes)


@lru_cache(maxsize=2**16)
def footprint(policy: Policy, trace: Trace, geometry: Geometry) -> Footprint:
    """The memory of `policy` over `trace`.

    Raises:
        ValueError: no query of the trace is scored.
    """
    readers = sum(segment.readers for segment in trace)
    if not readers:
        raise ValueError("a trace needs scored queries to average over")
    entries = total = 0.0
    highest = peak = packed = 0
    for number, (segment, (before, after)) in enumerate(zip(trace, counts(policy, trace), strict=True)):
        held = held_bytes(policy, before, packed, geometry)
        packed = policy.quantised(after, max(0, packed - (before - after)))
        rest = held_bytes(policy, after, packed, geometry)
        entries += segment.readers * after
        total += segment.readers * rest
        highest = max(highest, rest if segment.readers else 0)
        moved = number == 0 and (after < before or packed)
        peak = max(peak, held + rest if moved else held)
    return Footprint(entries / readers, total / readers, highest, peak)


def counts(policy: Policy, trace: Trace) -> Iterator[tuple[int, int]]:
    """Entries of each head after each segment, before and after compaction.

    Runs the policy's rule on one head whose states are zero: how many survive depends on counts alone.
    """
    position = torch.zeros(1, 0, dtype=torch.int32)
    sampled = seen = 0
    for segment in trace:
        fresh = torch.arange(seen, seen + segment.tokens, dtype=torch.int32)
        position = torch.cat([position, fresh[None]], dim=-1)
        seen += segment.tokens
        before = position.shape[-1]
        if due(policy, before, sampled):
            zeros = {state.name: torch.zeros(position.shape, dtype=state.dtype) for state in policy.states}
            outcome = compact(policy, View(sampled, seen, position, zeros, torch.zeros(position.shape)))
            position = position.gather(-1, outcome.index)
            sampled = outcome.sampled
        yield before, position.shape[-1]
