"""Several policies over one model in common forward passes.

While no policy has evicted anything, all their caches hold the same keys and values: they lie once, in a
*trunk*, and a prompt costs one pass for all. Attention records there whatever any of the policies wants to
know. A policy leaves the trunk for a slot of its own when it first compacts. Policies that attend in
different ways (`log_n`) never hold the same values, so each such way has a trunk of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apiary_server.model.attention import Batch, ChunkRun, DecodeRun
from apiary_server.model.loader import LoadedModel
from buzz import Buffers, Cache, Policy, State


class Ensemble:
    """The caches of some policies that are fed together, one session each.

    Args:
        loaded: the model.
        policies: resolved. One that does not evict lives in its trunk for good, so there is at most one
            for each `log_n`.
        capacity: entries of a trunk: all tokens that are fed before the last policy leaves it.

    Attributes:
        caches: one for each policy, in order.

    Raises:
        ValueError: two policies that attend in the same way do not evict.
    """

    def __init__(self, loaded: LoadedModel, policies: Sequence[Policy], capacity: int) -> None:
        self._loaded = loaded
        ways = [policy.log_n for policy in policies]
        stays = [policy.log_n for policy in policies if not policy.evicts]
        if len(set(stays)) < len(stays):
            raise ValueError("two policies that evict nothing are the same policy")
        self._trunks = {
            log_n: _Slab(loaded, [policy for policy in policies if policy.log_n == log_n], 1, capacity)
            for log_n in dict.fromkeys(ways)
        }
        self.caches = [
            Cache(policy, loaded.rotary, self._trunks[policy.log_n].slot(0, policy)) for policy in policies
        ]
        self._in_trunk = set(range(len(policies)))
        # slots in which one kernel can serve neighbours
        movers = [i for i in range(len(policies)) if policies[i].evicts]
        self._order = sorted(movers, key=lambda i: policies[i].log_n or 0)
        self._slots: _Slab | None = None

    def resize(self, policies: Sequence[Policy], slack: int) -> None:
        """Give the caches their policies' final sizes, and room for `slack` entries beyond their bounds.

        Raises:
            ValueError: something was evicted already.
        """
        if len(self._in_trunk) < len(self.caches):
            raise ValueError("caches that evicted cannot change their policies")
        for i, policy in enumerate(policies):
            state = self.caches[i].state()
            self.caches[i] = Cache(policy, self._loaded.rotary, self.caches[i].buffers)
            self.caches[i].restore(state)
        movers = [policies[i] for i in self._order]
        if movers:
            capacity = max(policy.bound for policy in movers) + slack
            self._slots = _Slab(self._loaded, movers, len(movers), capacity)

    def read(self, tokens: Sequence[int], at: Sequence[int] = ()) -> list[Tensor]:
        """Open a segment of the same tokens in all caches; `end` closes it.

        Args:
            tokens: at least one.
            at: places in `tokens`.

        Returns:
            For each policy the logits behind those places, `[len(at), vocab]`.
        """
        count = len(tokens)
        for cache in self.caches:
            cache.begin_segment(count)
            cache.prepare(count)
        work = _Pass(self._loaded)
        first: dict[int, int] = {}  # row of each policy
        for log_n, trunk in self._trunks.items():
            members = [i for i in self._in_trunk if self.caches[i].policy.log_n == log_n]
            if members:
                cache = self.caches[members[0]]
                states = trunk.states([self.caches[i].policy for i in members])
                row = work.chunk(trunk.memory(0), cache, tokens, states)
                first |= dict.fromkeys(members, row)
        for i, cache in enumerate(self.caches):
            if i not in self._in_trunk:
                first[i] = work.chunk(cache.buffers, cache, tokens, cache.policy.states)
        rows = sorted(set(first.values()))
        logits = work.run([row + place for row in rows for place in at])
        each = logits.view(len(rows), len(at), logits.shape[-1])
        for cache in self.caches:
            cache.append(count)
        return [each[rows.index(first[i])] for i in range(len(self.caches))]

    def end(self, *, leave: bool = False) -> None:
        """Close the segment: compact what is due.

        Args:
            leave: whether policies that had nothing to evict leave their trunk too, so that from now on each
                may be fed tokens of its own.
        """
        for i, cache in enumerate(self.caches):
            if i in self._in_trunk and cache.policy.evicts and (leave or cache.due):
                cache.end_segment(self._own(i))
                self._in_trunk.remove(i)
            else:
                cache.end_segment()

    def step(self, tokens: Mapping[int, int], ahead: int | None = None) -> Tensor:
        """Feed one token to each of some policies that have left the trunk, or live there for good.

        Args:
            tokens: by policy.
            ahead: None: each token is a segment. Else only look ahead: the token is put behind the cache's
                entries and `ahead` earlier ones of such a look, nothing is recorded, and the cache stays
                as it is.

        Returns:
            Logits `[len(tokens), vocab]`, in the order of `tokens`.
        """
        work = _Pass(self._loaded)
        row: dict[int, int] = {}
        for slab, members in self._neighbours(tokens):
            caches = [self.caches[i] for i in members]
            if ahead is None:
                for cache in caches:
                    cache.begin_segment(1)
                    cache.prepare(1)
            first = 0 if slab is not self._slots else self._order.index(members[0])
            states = slab.states([cache.policy for cache in caches]) if ahead is None else ()
            start = work.decode(
                slab.memory(slice(first, first + len(members))),
                caches,
                [tokens[i] for i in members],
                ahead or 0,
                states,
            )
            row |= {i: start + place for place, i in enumerate(members)}
        logits = work.run([row[i] for i in tokens])
        if ahead is None:
            for i in tokens:
                self.caches[i].append(1)
                self.caches[i].end_segment()
        return logits

    def look(self, texts: Sequence[Sequence[int]]) -> list[list[Tensor]]:
        """The logits that each policy gives behind each token of some texts, were they to come next. The
        caches stay as they are.

        Returns:
            For each policy and text `[len(text), vocab]`.
        """
        work = _Pass(self._loaded)
        for cache in self.caches:
            for text in texts:
                if text:
                    cache.buffers.require(cache.n + len(text))
                    work.chunk(cache.buffers, cache, text, ())
        logits = work.run(range(work.rows))
        parts = iter(logits.split([len(text) for _ in self.caches for text in texts]))
        return [[next(parts) for _ in texts] for _ in self.caches]

    def _own(self, i: int) -> Buffers:
        if self._slots is None:
            raise ValueError("policies have no slots before `resize`")
        return self._slots.slot(self._order.index(i), self.caches[i].policy)

    def _neighbours(self, wanted: Mapping[int, int]) -> Iterator[tuple[_Slab, list[int]]]:
        """Runs of policies that one kernel can serve: neighbouring slots, the same attention."""
        for i in wanted:
            if i in self._in_trunk:
                if self.caches[i].policy.evicts:
                    raise ValueError(f"{self.caches[i].policy} still shares the trunk")
                yield self._trunks[self.caches[i].policy.log_n], [i]
        if self._slots is not None:
            # the number of the gap before a slot is the same for all neighbours
            places = [
                (place, i) for place, i in enumerate(self._order) if i in wanted and i not in self._in_trunk
            ]
            numbered = [
                (self.caches[i].policy.log_n, place - rank, i) for rank, (place, i) in enumerate(places)
            ]
            for _, run in itertools.groupby(numbered, key=lambda each: each[:2]):
                yield self._slots, [i for *_, i in run]


class _Slab:
    """Memory for several caches, with room for every state that any of the policies records, once.

    States are told apart by what is recorded, not by their policies' names for them.
    """

    def __init__(self, loaded: LoadedModel, policies: Sequence[Policy], slots: int, capacity: int) -> None:
        shape = loaded.geometry
        flat = Buffers.empty(
            slots * shape.layers,
            shape.kv_heads,
            capacity,
            shape.head_dim,
            shape.dtype,
            loaded.model.device,
            self.states(policies),
        )

        def split(tensor: Tensor) -> Tensor:
            return tensor.view(slots, shape.layers, *tensor.shape[1:])

        self._keys, self._values, self._position = map(split, (flat.keys, flat.values, flat.position))
        self._state = {name: split(tensor) for name, tensor in flat.state.items()}

    def states(self, policies: Sequence[Policy]) -> tuple[State, ...]:
        """All that these policies record, under this slab's names."""
        found = {_key(policy, state): state for policy in policies for state in policy.states}
        return tuple(State(key, state.kind, state.decay) for key, state in found.items())

    def memory(self, index: int | slice) -> Buffers:
        """One slot, or several with a leading dimension; states under this slab's names."""
        state = {name: tensor[index] for name, tensor in self._state.items()}
        return Buffers(self._keys[index], self._values[index], self._position[index], state)

    def slot(self, index: int, policy: Policy) -> Buffers:
        """One slot, with the policy's states under the policy's names."""
        memory = self.memory(index)
        state = {state.name: memory.state[_key(policy, state)] for state in policy.states}
        return Buffers(memory.keys, memory.values, memory.position, state)


def _key(policy: Policy, state: State) -> str:
    return f"{state.kind} {state.decay} {policy.accumulates}"


@dataclass(slots=True)
class _Pass:
    """One forward pass in the making: packed rows and where they belong."""

    _loaded: LoadedModel
    _batch: Batch
    _tokens: list[int]
    _positions: list[int]

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._batch, self._tokens, self._positions = Batch(), [], []

    @property
    def rows(self) -> int:
        """How many so far."""
        return len(self._tokens)

    def chunk(self, memory: Buffers, cache: Cache, tokens: Sequence[int], states: Sequence[State]) -> int:
        """Add tokens behind a cache's entries; returns their first row."""
        rows = self._add(tokens, cache.next_positions(len(tokens)))
        log_n = cache.policy.log_n
        self._batch.chunks.append(ChunkRun(rows, memory, cache.n, cache.seen, tuple(states), log_n))
        return int(rows.start)

    def decode(
        self,
        memory: Buffers,
        caches: Sequence[Cache],
        tokens: Sequence[int],
        ahead: int,
        states: Sequence[State],
    ) -> int:
        """Add one token for each of neighbouring caches; returns the first row."""
        rows = self._add(tokens, [cache.next_positions(ahead + 1)[-1] for cache in caches])
        entries = [cache.n + ahead for cache in caches]
        seen = self._tensor([cache.seen + ahead for cache in caches])
        run = DecodeRun(
            rows,
            memory,
            self._tensor(entries),
            seen,
            max(entries) + 1,
            tuple(states),
            caches[0].policy.log_n,
        )
        self._batch.decodes.append(run)
        return int(rows.start)

    @torch.inference_mode()
    def run(self, keep: Sequence[int]) -> Tensor:
        """The logits of some rows, float32 `[len(keep), vocab]`."""
        if not self._tokens:
            return torch.empty(0, self._loaded.tokenizer.vocab_size)
        logits: Tensor = self._loaded.model(
            input_ids=self._tensor(self._tokens)[None],
            position_ids=self._tensor(self._positions)[None],
            use_cache=False,
            logits_to_keep=self._tensor(keep),
            apiary_batch=self._batch,
        ).logits
        return logits[0].float()

    def _add(self, tokens: Sequence[int], positions: Sequence[int]) -> slice:
        start = self.rows
        self._tokens += tokens
        self._positions += positions
        return slice(start, self.rows)

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=self._loaded.model.device)
