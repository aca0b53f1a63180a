"""What a policy's cache holds over a run, from counts alone: the model is never asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from apiary_server.sessions.pool import Geometry
from buzz import Policy, View

_POSITION_BYTES = 4
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


def entry_bytes(geometry: Geometry, states: int) -> int:
    """An entry of one head and layer: a key, a value, its position and its states."""
    return 2 * geometry.head_dim * geometry.dtype.itemsize + _POSITION_BYTES + states * _STATE_BYTES


def bytes_at_rest(policy: Policy, n: int, geometry: Geometry) -> int:
    """What a cache of `n` entries a head and layer takes under `policy`."""
    return n * geometry.layers * geometry.kv_heads * entry_bytes(geometry, len(policy.states))


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
    highest = peak = 0
    for number, (segment, (before, after)) in enumerate(zip(trace, counts(policy, trace), strict=True)):
        held, rest = (bytes_at_rest(policy, n, geometry) for n in (before, after))
        entries += segment.readers * after
        total += segment.readers * rest
        highest = max(highest, rest if segment.readers else 0)
        peak = max(peak, held + rest if number == 0 and after < before else held)
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
        while policy.due(position.shape[-1], sampled):
            zeros = {state.name: torch.zeros(position.shape, dtype=state.dtype) for state in policy.states}
            outcome = policy.compact(View(sampled, seen, position, zeros))
            position = position.gather(-1, outcome.index.expand(1, -1))
            sampled = outcome.sampled
        yield before, position.shape[-1]
