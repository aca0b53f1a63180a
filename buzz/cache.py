"""One session's bounded cache: counts and rules over memory that the caller gives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from buzz.attention import Record
from buzz.buffers import Buffers
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
        ValueError: the buffers lack a state that the policy needs.
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
        """Open a segment of `count` tokens: change positions over and restart masses where that is due.

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
        if not self.policy.accumulates:
            for state in self.policy.states:
                if state.kind == "mass":
                    self.buffers.state[state.name][:, :, : self.n] = 0

    def next_positions(self, count: int) -> range:
        """The rotary positions of the next `count` tokens."""
        start = self.n if self.rotated_in_cache else self.seen
        return range(start, start + count)

    def prepare(self, count: int) -> None:
        """Make room for a step's `count` tokens: notes their positions, and starts their states.

        Changes nothing that lives, so a step that fails in between leaves the cache as it was, but for
        the states that it may have changed.

        Raises:
            ValueError: they do not fit the memory.
        """
        end = self.n + count
        self.buffers.require(end)
        position = self.buffers.position
        position[:, :, self.n : end] = torch.arange(
            self.seen, self.seen + count, dtype=position.dtype, device=position.device
        )
        for state in self.policy.states:
            fresh = self.buffers.state[state.name][:, :, self.n : end]
            if state.kind == "vote":
                fresh.copy_(position[:, :, self.n : end])
            else:
                fresh.zero_()

    def records(self, layer: int, end: int) -> list[Record]:
        """What attention over the first `end` entries of a layer must record."""
        return [Record(s, self.buffers.state[s.name][layer, :, :end]) for s in self.policy.states]

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
            ValueError: the survivors do not fit `into`, or it lacks a state that the policy needs;
                nothing has changed then.
        """
        if not self.due:
            if into is not None:
                self.copy_to(into)
            return 0
        target = self.buffers if into is None else into
        outcome = self._compact()
        n = outcome.index.shape[-1]
        self._require(target, n)
        self._gather(outcome, target)
        for name, kept in outcome.state.items():
            target.state[name][:, :, :n] = kept
        evicted = self.n - n
        self.buffers, self.n, self.sampled = target, n, outcome.sampled
        self.evicted += evicted
        return evicted

    def copy_to(self, into: Buffers) -> None:
        """Move to other memory: the live entries are copied, and the cache lives in `into` from now on.

        Raises:
            ValueError: they do not fit, or `into` lacks a state that the policy needs; nothing has
                changed then.
        """
        self._require(into, self.n)
        into.copy_from(self.buffers, self.n)
        self.buffers = into

    def state(self) -> CacheState:
        """The counts as they are. They are a checkpoint together with what the caller copies aside:
        states before the next step, keys before `changes_over` or `due`, values and positions before
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
        missing = {state.name for state in self.policy.states} - buffers.state.keys()
        if missing:
            raise ValueError(f"policy {self.policy} needs the state {min(missing)!r}, which the buffers lack")

    def _compact(self) -> Compaction:
        """Apply the rule until it is content; index is then `[L, H, m]`, and all the states are given."""
        buffers, n = self.buffers, self.n
        state = {s.name: buffers.state[s.name][:, :, :n] for s in self.policy.states}
        view = View(self.sampled, self.seen, buffers.position[:, :, :n], state)
        keep, merge = view.span(0, n), None
        while self.policy.due(view.n, view.sampled):
            step = self.policy.compact(view)
            index = step.index.to(keep.device).expand(*keep.shape[:2], -1)
            if (index.shape[-1], step.sampled) == (view.n, view.sampled):
                raise RuntimeError(
                    f"policy {self.policy} is due at {view.n} entries and its compaction changes nothing"
                )
            if step.merge is not None or merge is not None:
                past = _goals(keep, self.n) if merge is None else merge
                goal = _goals(index, view.n) if step.merge is None else step.merge
                merge = goal.gather(-1, past.clamp(min=0)).where(past >= 0, past)
            keep = keep.gather(-1, index)
            state = {name: step.state.get(name, old.gather(-1, index)) for name, old in view.state.items()}
            view = View(step.sampled, self.seen, view.position.gather(-1, index), state)
        return Compaction(keep, view.sampled, view.state, merge)

    def _gather(self, outcome: Compaction, target: Buffers) -> None:
        """Write the survivors to the front of `target`, keys at their new positions.

        One layer at a time, so that temporary memory stays a layer's.
        """
        source, keep = self.buffers, outcome.index
        heads = torch.arange(keep.shape[1], device=keep.device).unsqueeze(1)
        m = keep.shape[-1]
        delta = torch.arange(m, device=keep.device) - keep
        for layer, index in enumerate(keep):
            if outcome.merge is None:
                keys, values = source.keys[layer][heads, index], source.values[layer][heads, index]
            else:
                keys, values = self._merged(layer, index, outcome.merge[layer])
            if self.rotated_in_cache:
                keys = self.rotary.rotate(keys, delta[layer])
            target.keys[layer, :, :m] = keys
            target.values[layer, :, :m] = values
            target.position[layer, :, :m] = source.position[layer][heads, index]

    def _merged(self, layer: int, index: Tensor, merge: Tensor) -> tuple[Tensor, Tensor]:
        """The survivors `index` `[H, m]` of a layer as means of what `merge` `[H, n]` gives them.

        Keys are moved to their survivor's position first: the mean of keys at different positions would
        mean nothing.
        """
        buffers, n = self.buffers, self.n
        joins = merge >= 0
        goal = merge.clamp(min=0)
        if self.rotated_in_cache:
            place = torch.arange(n, device=merge.device).expand_as(merge)
        else:
            place = buffers.position[layer, :, :n].long()
        delta = place.gather(-1, index).gather(-1, goal) - place
        keys = self.rotary.rotate(buffers.keys[layer, :, :n], delta)
        count = torch.zeros(index.shape, device=merge.device, dtype=torch.int64).scatter_add_(
            -1, goal, joins.long()
        )

        def mean(entries: Tensor) -> Tensor:
            wide = entries.to(torch.promote_types(entries.dtype, torch.float32))
            wide = wide.masked_fill(~joins.unsqueeze(-1), 0)  # what is dropped may be anything
            total = wide.new_zeros(*index.shape, entries.shape[-1])
            total.scatter_add_(-2, goal.unsqueeze(-1).expand_as(wide), wide)
            return (total / count.unsqueeze(-1)).to(entries.dtype)

        return mean(keys), mean(buffers.values[layer, :, :n])


def _goals(index: Tensor, n: int) -> Tensor:
    """For each of `n` entries its place in `index` `[L, H, m]`, -1 where it has none: a merge of nothing."""
    place = torch.arange(index.shape[-1], device=index.device).expand_as(index)
    return index.new_full((*index.shape[:-1], n), -1).scatter(-1, index, place)
