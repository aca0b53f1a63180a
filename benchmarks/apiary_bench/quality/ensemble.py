"""Several policies over one model in common forward passes.

While no policy has evicted anything, all their caches hold the same keys and values: they lie once, in a
*trunk*, and a prompt costs one pass for all. Attention records there whatever any of the policies wants to
know. A policy leaves the trunk for a slot of its own when it first compacts or quantises. Policies that
attend in different ways (`log_n`) never hold the same values, so each such way has a trunk of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from apiary_bench.quality.forward import Pass
from apiary_bench.quality.slab import Slab
from apiary_server.model.loader import LoadedModel
from buzz import Buffers, Cache, Policy
from buzz.quant import BLOCK


class Ensemble:
    """The caches of some policies that are fed together, one session each.

    Args:
        loaded: the model.
        policies: resolved. One that neither evicts nor quantises lives in its trunk for good, so there is
            at most one for each `log_n`.
        capacity: entries of a trunk: all tokens that are fed before the last policy leaves it.

    Attributes:
        loaded: the model.
        caches: one for each policy, in order.

    Raises:
        ValueError: two policies would live in one trunk for good.
    """

    def __init__(self, loaded: LoadedModel, policies: Sequence[Policy], capacity: int) -> None:
        self.loaded = loaded
        self._capacity = capacity
        ways = [policy.log_n for policy in policies]
        stays = [policy.log_n for policy in policies if not _leaves(policy)]
        if len(set(stays)) < len(stays):
            raise ValueError("two policies would live in one trunk for good: they are the same")
        self._trunks = {
            log_n: Slab(loaded, [policy for policy in policies if policy.log_n == log_n], 1, capacity)
            for log_n in dict.fromkeys(ways)
        }
        self.caches = [
            Cache(policy, loaded.rotary, self._trunks[policy.log_n].slot(0, policy)) for policy in policies
        ]
        self._in_trunk = set(range(len(policies)))
        # slots in which one kernel can serve neighbours; those that quantise are served apart
        movers = [i for i, policy in enumerate(policies) if policy.evicts and policy.kivi is None]
        self._order = sorted(movers, key=lambda i: policies[i].log_n or 0)
        self._slots: Slab | None = None
        self._packed: dict[int, Buffers] = {}

    def resize(self, policies: Sequence[Policy], slack: int) -> None:
        """Give the caches their policies' final sizes, and room for `slack` entries beyond their bounds.

        Raises:
            ValueError: something was evicted already.
        """
        if len(self._in_trunk) < len(self.caches):
            raise ValueError("caches that evicted cannot change their policies")
        for i, policy in enumerate(policies):
            state = self.caches[i].state()
            self.caches[i] = Cache(policy, self.loaded.rotary, self.caches[i].buffers)
            self.caches[i].restore(state)
        movers = [policies[i] for i in self._order]
        if movers:
            capacity = max(policy.bound for policy in movers) + slack
            self._slots = Slab(self.loaded, movers, len(movers), capacity)
        self._packed = {
            i: self._packing(policy, slack) for i, policy in enumerate(policies) if policy.kivi is not None
        }

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
        work = Pass(self.loaded)
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
                first[i] = work.chunk(cache.live, cache, tokens, cache.policy.states)
        rows = sorted(set(first.values()))
        logits = work.run([row + place for row in rows for place in at])
        each = logits.view(len(rows), len(at), logits.shape[-1])
        for cache in self.caches:
            cache.append(count)
        return [each[rows.index(first[i])] for i in range(len(self.caches))]

    def end(self, *, leave: bool = False) -> None:
        """Close the segment: compact what is due, quantise what is old.

        Args:
            leave: whether policies that had nothing to do leave their trunk too, so that from now on each
                may be fed tokens of its own.
        """
        for i, cache in enumerate(self.caches):
            if i in self._in_trunk and _leaves(cache.policy) and (leave or cache.settles()):
                cache.end_segment(self._own(i))
                self._in_trunk.remove(i)
            else:
                cache.end_segment()

    def step(self, tokens: Mapping[int, int], ahead: int | None = None) -> Tensor:
        """`step` of this ensemble alone."""
        return step([self], [tokens], ahead)[0]

    def look(self, texts: Sequence[Sequence[int]]) -> list[list[Tensor]]:
        """The logits that each policy gives behind each token of some texts, were they to come next. The
        caches stay as they are.

        Returns:
            For each policy and text `[len(text), vocab]`.
        """
        work = Pass(self.loaded)
        for cache in self.caches:
            for text in texts:
                if text:
                    cache.buffers.require(cache.n + len(text), cache.packed)
                    work.chunk(cache.live, cache, text, ())
        logits = work.run(range(work.rows))
        parts = iter(logits.split([len(text) for _ in self.caches for text in texts]))
        return [[next(parts) for _ in texts] for _ in self.caches]

    def _pack(self, work: Pass, tokens: Mapping[int, int], ahead: int | None) -> list[int]:
        """Add one token for each of some policies to a pass; returns their rows."""
        row: dict[int, int] = {}
        for i in tokens if ahead is None else ():
            self.caches[i].begin_segment(1)
            self.caches[i].prepare(1)
        for i in tokens:
            if i in self._packed and i not in self._in_trunk:
                cache = self.caches[i]
                states = cache.policy.states if ahead is None else ()
                row[i] = work.chunk(cache.live, cache, [tokens[i]], states, ahead or 0)
        for slab, members in self._neighbours(tokens):
            caches = [self.caches[i] for i in members]
            first = 0 if slab is not self._slots else self._order.index(members[0])
            states = slab.states([cache.policy for cache in caches]) if ahead is None else ()
            memory = slab.memory(slice(first, first + len(members)))
            start = work.decode(memory, caches, [tokens[i] for i in members], ahead or 0, states)
            row |= {i: start + place for place, i in enumerate(members)}
        return [row[i] for i in tokens]

    def _commit(self, tokens: Mapping[int, int]) -> None:
        for i in tokens:
            self.caches[i].append(1)
            self.caches[i].end_segment()

    def _packing(self, policy: Policy, slack: int) -> Buffers:
        """Memory for a policy that quantises, in which no segment of `slack` tokens has to quantise early."""
        shape = self.loaded.geometry
        capacity = min(policy.bound, self._capacity) + slack
        dense = min(capacity, policy.residual + BLOCK + slack)
        return Buffers.empty(
            shape.layers,
            shape.kv_heads,
            capacity + dense,
            shape.head_dim,
            shape.dtype,
            self.loaded.backend.device,
            policy.states,
            policy.kivi,
            capacity,
        )

    def _own(self, i: int) -> Buffers:
        if i in self._packed:
            return self._packed[i]
        if self._slots is None:
            raise ValueError("policies have no slots before `resize`")
        return self._slots.slot(self._order.index(i), self.caches[i].policy)

    def _neighbours(self, wanted: Mapping[int, int]) -> Iterator[tuple[Slab, list[int]]]:
        """Runs of policies that one kernel can serve: neighbouring slots, the same attention."""
        for i in wanted:
            if i in self._in_trunk:
                if _leaves(self.caches[i].policy):
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


def step(
    ensembles: Sequence[Ensemble], tokens: Sequence[Mapping[int, int]], ahead: int | None = None
) -> list[Tensor]:
    """Feed one token to each of some policies of some ensembles of one model, in one pass.

    Args:
        ensembles: at least one.
        tokens: for each ensemble by policy; policies that have left the trunk, or live there for good.
        ahead: None: each token is a segment. Else only look ahead: the token is put behind the cache's
            entries and `ahead` earlier ones of such a look, nothing is recorded, and the cache stays as it
            is.

    Returns:
        For each ensemble logits `[len(tokens), vocab]`, in the order of its tokens.
    """
    work = Pass(ensembles[0].loaded)
    rows = [each._pack(work, fed, ahead) for each, fed in zip(ensembles, tokens, strict=True)]
    logits = work.run([row for each in rows for row in each])
    for ensemble, fed in zip(ensembles, tokens, strict=True) if ahead is None else ():
        ensemble._commit(fed)
    return list(logits.split([len(fed) for fed in tokens]))


def _leaves(policy: Policy) -> bool:
    return policy.evicts or policy.kivi is not None
