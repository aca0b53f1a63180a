"""One session's bounded cache: counts and rules over memory that the caller gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from buzz.policy import Policy
from buzz.rotary import Rotary


@dataclass
class Buffers:
    """Memory for a session's entries, L layers of H KV heads: fresh tensors, or views into a pool's slot.

    Attributes:
        keys: floating `[L, H, C, head_dim]`, rotated.
        values: floating `[L, H, C, head_dim]`.
        position: int32 `[L, H, C]`, each entry's original token position.
        score: float32 or wider `[L, H, C]`, or None for policies that are not `scored`.
    """

    keys: Tensor
    values: Tensor
    position: Tensor
    score: Tensor | None

    @classmethod
    def empty(
        cls,
        layers: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        scored: bool,
    ) -> Self:
        """Fresh zeroed memory for `capacity` entries; scores in float32, or float64 where `dtype` is."""
        shape = (layers, kv_heads, capacity)
        wide = torch.promote_types(dtype, torch.float32)
        return cls(
            keys=torch.zeros(*shape, head_dim, dtype=dtype, device=device),
            values=torch.zeros(*shape, head_dim, dtype=dtype, device=device),
            position=torch.zeros(shape, dtype=torch.int32, device=device),
            score=torch.zeros(shape, dtype=wide, device=device) if scored else None,
        )

    @property
    def capacity(self) -> int:
        """Entries that fit."""
        return self.keys.shape[2]

    def copy_from(self, source: Buffers, n: int) -> None:
        """Copy the first `n` entries of `source`; scores where both have them.

        Raises:
            ValueError: they do not fit.
        """
        self.require(n)
        self.keys[:, :, :n] = source.keys[:, :, :n]
        self.values[:, :, :n] = source.values[:, :, :n]
        self.position[:, :, :n] = source.position[:, :, :n]
        if self.score is not None and source.score is not None:
            self.score[:, :, :n] = source.score[:, :, :n]

    def require(self, n: int) -> None:
        """Check that `n` entries fit.

        Raises:
            ValueError: they do not.
        """
        if n > self.capacity:
            raise ValueError(f"{n} entries do not fit a capacity of {self.capacity}")


@dataclass(frozen=True)
class CacheState:
    """A cache's counts, to return to; see `Cache.state`."""

    n: int
    sampled: int
    seen: int
    evicted: int
    rotated_in_cache: bool


class Cache:
    """The entries of one session, kept within its policy's bound.

    A *segment* is a prompt (or as much of one as fits the memory) or one generated token. Its tokens
    may come in any number of steps; compaction is considered when it ends, so the outcome never depends
    on how it was cut:

        cache.begin_segment(count)
        for step in cuts:                       # sum(cuts) == count
            cache.prepare(step)
            ...                                 # rotate queries and keys to cache.next_positions(step),
            ...                                 # write keys and values at [n, n + step) of each layer,
            ...                                 # attend with mass=cache.buffers.score[layer, :, :n + step]
            cache.append(step)
        evicted = cache.end_segment()

    Keys are stored rotated and moved by position differences. Below float32 each move rounds a key once
    more, by at most half a unit in the last place, and the number of moves is bounded because an index
    only ever falls: a BUZZ entry at offset o of the sampled middle survives only while o divides evenly,
    each time to o / ((stride + 1) // 2), so it moves at most log2(threshold) + 1 times there, and once a
    compaction (every `threshold / 2` tokens or more, by default) while in the window; offset 0 and the
    sinks never move. In sliding caches an entry moves at each eviction while in the window: `window /
    block` times for `streaming`. An H2O heavy hitter moves whenever anything before it goes: at most as
    often as its index, which is why `block` matters there most.

    Attributes:
        policy: the rule; a `full` policy should be resolved.
        rotary: the model's rotary embedding.
        buffers: where the entries live; the first `n` of each layer and head are used.
        n: entries in each layer and head.
        sampled: middle entries that an earlier compaction sampled.
        seen: tokens ever appended.
        evicted: entries of each layer and head evicted so far.
        rotated_in_cache: whether keys are rotated to in-cache indices (else to original positions).

    Raises:
        ValueError: the policy needs scores and the buffers have none.
    """

    def __init__(self, policy: Policy, rotary: Rotary, buffers: Buffers) -> None:
        self.policy = policy
        self.rotary = rotary
        self._require(buffers, 0)
        self.buffers = buffers
        self.n = 0
        self.sampled = 0
        self.seen = 0
        self.evicted = 0
        self.rotated_in_cache = policy.positions == "in_cache"

    @property
    def due(self) -> bool:
        """Whether the segment's end would compact."""
        return self.policy.due(self.n, self.sampled)

    def changes_over(self, count: int) -> bool:
        """Whether a segment of `count` tokens would first rotate all keys to in-cache positions."""
        return not self.rotated_in_cache and self.seen + count > self.rotary.max_positions

    def begin_segment(self, count: int) -> None:
        """Open a segment of `count` tokens: change positions over and restart scores where that is due.

        Raises:
            ValueError: the tokens would get positions that the model was not trained for.
        """
        if count < 1 or self.n + count > self.rotary.max_positions:
            raise ValueError(
                f"a segment has 1 to {self.rotary.max_positions - self.n} tokens here, not {count}: "
                f"{self.n} entries are held and the model has {self.rotary.max_positions} positions"
            )
        if self.changes_over(count):
            index = torch.arange(self.n, device=self.buffers.position.device)
            for keys, position in zip(self.buffers.keys, self.buffers.position, strict=True):
                live = keys[:, : self.n]
                live.copy_(self.rotary.rotate(live, index - position[:, : self.n]))
            self.rotated_in_cache = True
        if self.buffers.score is not None and not self.policy.accumulates:
            self.buffers.score[:, :, : self.n] = 0

    def next_positions(self, count: int) -> range:
        """The rotary positions of the next `count` tokens."""
        start = self.n if self.rotated_in_cache else self.seen
        return range(start, start + count)

    def prepare(self, count: int) -> None:
        """Make room for a step's `count` tokens: records their positions, and their scores start at 0.

        Changes nothing that lives, so a step that fails in between leaves the cache as it was, but for
        the score mass that it may have added.

        Raises:
            ValueError: they do not fit the memory.
        """
        end = self.n + count
        self.buffers.require(end)
        position = self.buffers.position
        position[:, :, self.n : end] = torch.arange(
            self.seen, self.seen + count, dtype=position.dtype, device=position.device
        )
        if self.buffers.score is not None:
            self.buffers.score[:, :, self.n : end] = 0

    def append(self, count: int) -> None:
        """Count the entries that a step wrote at `[n, n + count)` of each layer."""
        self.n += count
        self.seen += count

    def end_segment(self, into: Buffers | None = None) -> int:
        """Compact until the policy is content, and move to `into` where given.

        Args:
            into: memory that does not overlap the present one; the cache then lives there.

        Returns:
            Entries evicted from each layer and head.

        Raises:
            ValueError: the survivors do not fit `into`, or it lacks the scores that the policy needs;
                nothing has changed then.
        """
        if not self.due:
            if into is not None:
                self.copy_to(into)
            return 0
        target = self.buffers if into is None else into
        n, sampled, score = self.n, self.sampled, self.buffers.score
        score = score[:, :, :n] if score is not None and self.policy.scored else None
        keep = torch.arange(n, device=self.buffers.keys.device).expand(*self.buffers.keys.shape[:2], n)
        while self.policy.due(n, sampled):
            step = self.policy.compact(n, sampled, score)
            keep = keep.gather(-1, step.index.to(keep.device).expand(*keep.shape[:2], -1))
            if (keep.shape[-1], step.sampled) == (n, sampled):
                raise RuntimeError(
                    f"policy {self.policy} is due at {n} entries and its compaction changes nothing"
                )
            n, sampled, score = keep.shape[-1], step.sampled, step.score
        self._require(target, n)
        self._gather(keep, target)
        if target.score is not None and score is not None:
            target.score[:, :, :n] = score
        evicted = self.n - n
        self.buffers, self.n, self.sampled = target, n, sampled
        self.evicted += evicted
        return evicted

    def copy_to(self, into: Buffers) -> None:
        """Move to other memory: the live entries are copied, and the cache lives in `into` from now on.

        Raises:
            ValueError: they do not fit, or `into` lacks the scores that the policy needs; nothing has
                changed then.
        """
        self._require(into, self.n)
        into.copy_from(self.buffers, self.n)
        self.buffers = into

    def state(self) -> CacheState:
        """The counts as they are. They are a checkpoint together with what the caller copies aside:
        scores before the next step, keys before `changes_over` or `due`, values and positions before
        `due`; plain appending changes nothing else of the first `n` entries.
        """
        return CacheState(self.n, self.sampled, self.seen, self.evicted, self.rotated_in_cache)

    def restore(self, state: CacheState) -> None:
        """Return to `state`; the entries are the caller's to put back."""
        self.n = state.n
        self.sampled = state.sampled
        self.seen = state.seen
        self.evicted = state.evicted
        self.rotated_in_cache = state.rotated_in_cache

    def _require(self, buffers: Buffers, n: int) -> None:
        buffers.require(n)
        if self.policy.scored and buffers.score is None:
            raise ValueError(f"policy {self.policy} needs scores, and the buffers have none")

    def _gather(self, keep: Tensor, target: Buffers) -> None:
        """Write the entries `keep` (int64 `[L, H, m]`) to the front of `target`, keys at their new positions.

        One layer at a time, so that temporary memory stays a layer's.
        """
        source, m = self.buffers, keep.shape[-1]
        heads = torch.arange(keep.shape[1], device=keep.device).unsqueeze(1)
        delta = torch.arange(m, device=keep.device) - keep
        for layer, index in enumerate(keep):
            keys = source.keys[layer][heads, index]
            if self.rotated_in_cache:
                keys = self.rotary.rotate(keys, delta[layer])
            target.keys[layer, :, :m] = keys
            target.values[layer, :, :m] = source.values[layer][heads, index]
            target.position[layer, :, :m] = source.position[layer][heads, index]
