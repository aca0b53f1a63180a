"""One session's bounded cache: counts and rules over memory that the caller gives."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from buzz.attention import Record
from buzz.buffers import Buffers
from buzz.compaction import compact, due
from buzz.moving import Move, layers
from buzz.policy import Compaction, Policy, View
from buzz.rotary import Rotary


@dataclass(frozen=True)
class CacheState:
    """A cache's counts, to return to; see `Cache.state`."""

    n: int
    sampled: int
    seen: int
    evicted: int
    rotated_in_cache: bool
    packed: int = 0
    measured: bool = False


class Cache:
    """The entries of one session, kept within its policy's bound.

    A *segment* is a prompt (or as much of one as fits the memory) or one generated token. Its tokens
    may come in any number of steps; compaction is considered when it ends, so the outcome never depends
    on how it was cut:

        cache.begin_segment(count)
        for step in cuts:                       # sum(cuts) == count
            cache.prepare(step)
            ...                                 # rotate queries and keys to cache.next_positions(step),
            ...                                 # write with cache.extend(layer, keys, values),
            ...                                 # attend with records=cache.records(layer, n + step)
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

    A policy with `kivi` has all but its most recent entries quantised, whenever a segment ends; how many
    depends on counts, and on which segments went through a workspace. What was quantised once keeps its
    codes: survivors are read, chosen and quantised again without loss (see `buzz.quant`). Below float32 that
    holds while they stay packed; those that come back among the most recent are rounded there.

    Attributes:
        policy: the rule; a `full` policy should be resolved.
        states: what the policy declared.
        rotary: the model's rotary embedding.
        buffers: where the entries live; the first `n` of each layer and head are used. To be read and
            extended as `live` only, which knows what is quantised of them.
        n: entries in each layer and head.
        sampled: middle entries that an earlier compaction sampled.
        seen: tokens ever appended.
        evicted: entries of each layer and head evicted so far.
        rotated_in_cache: whether keys are rotated to in-cache indices (else to original positions).
        packed: of the entries, how many are quantised: the first ones.
        measured: whether the key channels' ranges are known, and fixed.

    Raises:
        ValueError: the buffers lack a state, or the packed memory, that the policy needs.
    """

    def __init__(self, policy: Policy, rotary: Rotary, buffers: Buffers) -> None:
        self.policy = policy
        self.states = policy.states
        self.rotary = rotary
        self._require(buffers, 0)
        self.buffers = buffers
        self.n = 0
        self.sampled = 0
        self.seen = 0
        self.evicted = 0
        self.rotated_in_cache = policy.positions == "in_cache"
        self.packed = 0
        self.measured = False

    @property
    def live(self) -> Buffers:
        """The memory as it is used now, for batches of it to be read and extended until the segment ends."""
        packed = self.buffers.packed
        if packed is None or not self.packed:
            return self.buffers
        using = packed.using(self.packed, self.packed, self.rotary, self.rotated_in_cache)
        return replace(self.buffers, packed=using)

    @property
    def room(self) -> int:
        """The most tokens that the next segment may have in this memory."""
        room, dense = self.buffers.capacity - self.n, self.n - self.packed
        if self.measured:  # then some can be quantised to make room
            dense = min(dense, self.policy.residual // 2)
        return min(room, self.buffers.dense - dense)

    @property
    def due(self) -> bool:
        """Whether the segment's end would compact."""
        return due(self.policy, self.n, self.sampled)

    def settles(self, count: int = 0) -> bool:
        """Whether the segment's end, after `count` more tokens, would compact or quantise."""
        n, packed = self.n + count, self._packed_for(count)
        return due(self.policy, n, self.sampled) or self.policy.quantised(n, packed) > packed

    def makes_room(self, count: int) -> bool:
        """Whether a segment of `count` tokens would first quantise entries, since it would not fit."""
        packed = self._packed_for(count)
        return self.measured and packed > self.packed and self.buffers.fits(self.n + count, packed)

    def changes_over(self, count: int) -> bool:
        """Whether a segment of `count` tokens would first rotate all keys to in-cache positions."""
        return not self.rotated_in_cache and self.seen + count > self.rotary.max_positions

    def begin_segment(self, count: int) -> None:
        """Open a segment of `count` tokens: make room, change positions over and restart masses where due.

        Raises:
            ValueError: the tokens would get positions that the model was not trained for.
        """
        if count < 1 or self.n + count > self.rotary.max_positions:
            raise ValueError(
                f"a segment has 1 to {self.rotary.max_positions - self.n} tokens here, not {count}: "
                f"{self.n} entries are held and the model has {self.rotary.max_positions} positions"
            )
        if self.makes_room(count):
            self._move(self.buffers, self._packed_for(count))
        if self.changes_over(count):
            index = torch.arange(self.packed, self.n, device=self.buffers.position.device)
            by = index - self.buffers.position[:, :, self.packed : self.n]
            self.buffers.turn(self.n - self.packed, by, self.rotary, self.buffers.dtype)
            self.rotated_in_cache = True
        for state in self.states:
            if state.per == "segment":
                self.buffers.state[state.name][:, :, : self.n] = 0

    def next_positions(self, count: int) -> range:
        """The rotary positions of the next `count` tokens."""
        start = self.n if self.rotated_in_cache else self.seen
        return range(start, start + count)

    def require(self, count: int) -> None:
        """Check that a step's `count` tokens fit the memory.

        Raises:
            ValueError: they do not.
        """
        self.buffers.require(self.n + count, self.packed)

    def prepare(self, count: int) -> None:
        """Make room for a step's `count` tokens: notes their positions, and starts their states.

        Changes nothing that lives, so a step that fails in between leaves the cache as it was, but for
        the states that it may have changed.

        Raises:
            ValueError: they do not fit the memory.
        """
        self.require(count)
        self.buffers.begin(self.n, self.n + count, self.seen, self.states)

    def records(self, layer: int, end: int) -> list[Record]:
        """What attention over the first `end` entries of a layer must record."""
        return [Record(s, self.buffers.state[s.name][layer, :, :end]) for s in self.states]

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write a step's entries of a layer, and read all up to them.

        Args:
            layer: which.
            keys: rotated to `next_positions`, `[H, count, head_dim]`.
            values: the same.

        Returns:
            Rotated keys and values, `[H, n + count, head_dim]`, n not counting the step's until `append`.
        """
        return self.live.extend(layer, self.n, keys, values)

    def append(self, count: int) -> None:
        """Count the entries that a step wrote at `[n, n + count)` of each layer."""
        self.n += count
        self.seen += count

    def end_segment(self, into: Buffers | None = None) -> int:
        """Compact until the policy is content, quantise if it asks for that, and move to `into` where given.

        Args:
            into: memory that does not overlap the present one; the cache then lives there.

        Returns:
            Entries evicted from each layer and head.

        Raises:
            ValueError: the survivors do not fit `into`, or it lacks a state or the packed memory that the
                policy needs; nothing has changed then.
        """
        target = self.buffers if into is None else into
        outcome = self._compact() if self.due else None
        evicted = 0 if outcome is None else self.n - outcome.index.shape[-1]
        packed = self.policy.quantised(self.n - evicted, max(0, self.packed - evicted))
        if outcome is None and target is self.buffers and packed == self.packed:
            return 0
        self._require(target, self.n - evicted, packed)
        self._move(target, packed, outcome)
        self.evicted += evicted
        return evicted

    def copy_to(self, into: Buffers) -> None:
        """Move to other memory: the live entries are copied, and the cache lives in `into` from now on. What
        is quantised stays so if it fits as it is.

        Raises:
            ValueError: they do not fit, or `into` lacks a state or the packed memory that the policy needs;
                nothing has changed then.
        """
        packed = self.packed if into.fits(self.n, self.packed) else 0
        self._require(into, self.n, packed)
        self._move(into, packed)

    def state(self) -> CacheState:
        """The counts as they are. They are a checkpoint together with what the caller copies aside:
        states before the next step, keys before `changes_over`, everything before `makes_room` or `settles`;
        plain appending changes nothing else of the first `n` entries.
        """
        return CacheState(
            self.n, self.sampled, self.seen, self.evicted, self.rotated_in_cache, self.packed, self.measured
        )

    def twin(self, buffers: Buffers) -> Cache:
        """A cache of its own over a copy of the memory."""
        twin = Cache(self.policy, self.rotary, buffers)
        twin.restore(self.state())
        return twin

    def restore(self, state: CacheState) -> None:
        """Return to `state`; the entries are the caller's to put back."""
        self.n = state.n
        self.sampled = state.sampled
        self.seen = state.seen
        self.evicted = state.evicted
        self.rotated_in_cache = state.rotated_in_cache
        self.packed = state.packed
        self.measured = state.measured

    def _packed_for(self, count: int) -> int:
        """How many entries have to be packed before `count` more tokens come."""
        if self.policy.kivi is None:
            return 0
        return max(self.packed, self.n + count - self.buffers.dense)

    def _require(self, buffers: Buffers, n: int, packed: int = 0) -> None:
        bits = self.policy.kivi
        if bits is not None and (
            buffers.packed is None or (buffers.packed.capacity and buffers.packed.bits != bits)
        ):
            raise ValueError(f"policy {self.policy} needs memory for entries of {bits} bits")
        buffers.require(n, packed)
        missing = {state.name for state in self.states} - buffers.state.keys()
        if missing:
            raise ValueError(f"policy {self.policy} needs the state {min(missing)!r}, which the buffers lack")

    def _compact(self) -> Compaction:
        buffers, n = self.buffers, self.n
        state = {s.name: buffers.state[s.name][:, :, :n] for s in self.states}
        norm = self._value_norm() if self.policy.weighs_values else None
        return compact(self.policy, View(self.sampled, self.seen, buffers.position[:, :, :n], state, norm))

    def _value_norm(self) -> Tensor:
        """`[L, H, n]`, at least float32: squares overflow float16. What is packed is read a few layers at a
        time, as in moving."""
        live, n, wide = self.live, self.n, torch.promote_types(self.buffers.dtype, torch.float32)
        norms = [live.value_norms(n - self.packed, wide)]
        if live.packed is not None and self.packed:
            parts = (live.packed.values(some, self._wide) for some in layers(len(live.values), n))
            norms.insert(0, torch.cat([torch.linalg.vector_norm(part, dim=-1, dtype=wide) for part in parts]))
        return torch.cat(norms, dim=-1)

    def _move(self, target: Buffers, packed: int, outcome: Compaction | None = None) -> None:
        """Write the entries, or the survivors of `outcome`, to `target`, the first of them packed."""
        Move(
            source=self.live,
            target=target,
            n=self.n,
            before=self.packed,
            after=packed,
            outcome=outcome,
            measured=self.measured,
            rotary=self.rotary,
            in_cache=self.rotated_in_cache,
            dtype=self._wide,
        ).run()
        self.measured |= packed > 0
        self.buffers, self.packed = target, packed
        if outcome is not None:
            self.n, self.sampled = outcome.index.shape[-1], outcome.sampled

    @property
    def _wide(self) -> torch.dtype:
        """In which dtype entries are moved: where they are quantised nothing may be rounded between."""
        dtype = self.buffers.dtype
        return dtype if self.policy.kivi is None else torch.promote_types(dtype, torch.float32)
