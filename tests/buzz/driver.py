"""Drives the library's cache with random tokens, as an engine would, beside the naive restatement."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch

from buzz import (
    Buffers,
    Cache,
    Policy,
    Record,
    Rotary,
    View,
    attend_chunk,
    attend_decode,
)
from tests.buzz import naive
from tests.buzz.rules import Entry


def view_of(
    score: torch.Tensor | None = None,
    sampled: int = 0,
    n: int = 0,
    seen: int | None = None,
    **state: torch.Tensor,
) -> View:
    """A cache at rest, of `score` `[..., kv_heads, n]` (or no state): entries 0 to n - 1, unless told."""
    if score is not None:
        state["score"] = score
    position = state.pop("position", None)
    if position is None:
        shape = next(iter(state.values())).shape if state else (2, n)
        position = torch.arange(shape[-1], dtype=torch.int32).expand(shape)
    return View(sampled, position.shape[-1] if seen is None else seen, position, state)


def segments(seed: int, steps: int, longest: int = 40) -> list[list[int]]:
    """Single tokens, and one prompt among ten, cut anyhow, until `steps` steps are full."""
    random = np.random.default_rng(seed)
    result, total = [], 0
    while total < steps:
        prompt = random.random() < 0.1
        result.append(cuts_of(random, int(random.integers(1, longest + 1))) if prompt else [1])
        total += len(result[-1])
    return result


def cuts_of(random: np.random.Generator, count: int) -> list[int]:
    """`count` tokens in one to four steps."""
    edges = sorted({0, count, *random.integers(1, count + 1, size=3).tolist()})
    return [b - a for a, b in itertools.pairwise(edges)]


@dataclasses.dataclass
class Shape:
    layers: int = 1
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 4
    max_positions: int = 4096
    capacity: int = 256
    dtype: torch.dtype = torch.float64

    def memory(self, policy: Policy, capacity: int, sessions: int = 1, packed: int = 0) -> Buffers:
        """Fresh memory, the layers of one session after the other's; of NaN, on which nothing may depend.

        It has room for `packed` quantised entries beside the `capacity` others.
        """
        size = (sessions * self.layers, self.kv_heads, capacity + packed, self.head_dim)
        buffers = Buffers.empty(*size, self.dtype, "cpu", policy.states, policy.kivi, packed)
        buffers.keys.fill_(torch.nan)
        return buffers


class Driver:
    """One session of the library; tokens come from `seed`, so two drivers see the same text."""

    def __init__(
        self,
        policy: Policy,
        shape: Shape,
        seed: int = 0,
        slot: bool = False,
        workspace: Buffers | None = None,
    ) -> None:
        self.shape = shape
        self.policy = policy
        self.random = np.random.default_rng(seed)
        self.rotary = Rotary.of(shape.head_dim, shape.max_positions, theta=100.0)
        self.workspace = workspace or self.memory(shape.capacity, 0 if slot else None)
        self.slot = self.memory(policy.bound + 8) if slot else None
        self.cache = Cache(policy, self.rotary, self.workspace)
        self.keys: list[np.ndarray] = []  # unrotated, [layer, kv_heads, head_dim] of each token ever seen
        self.steps = 0
        self.output = torch.empty(0)  # of the last step, [layer, query_heads, count, head_dim]

    def memory(self, capacity: int, packed: int | None = None) -> Buffers:
        """Memory for so many entries and, unless told, for all quantised ones if the policy quantises."""
        if packed is None:
            packed = 0 if self.policy.kivi is None else self.policy.bound
        return self.shape.memory(self.policy, capacity, packed=packed)

    def draw(self, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Random queries, keys and values `[count, layer, heads, head_dim]`."""
        shape = self.shape
        token = (count, shape.layers, shape.kv_heads * (shape.group + 2), shape.head_dim)
        drawn = self.random.standard_normal(token)
        query, key, value = np.split(
            drawn, [shape.kv_heads * shape.group, shape.kv_heads * (shape.group + 1)], axis=2
        )
        self.keys += list(key)
        return query * 1.5, key, value

    def segment(self, cuts: Sequence[int], oracle: naive.Session | None = None) -> int:
        """One segment in steps of `cuts` tokens; checks the outputs against `oracle` and advances it."""
        cache = self.cache
        if self.slot is not None and cache.buffers is self.slot:
            cache.copy_to(self.workspace)
        cache.begin_segment(sum(cuts))
        if oracle is not None:
            oracle.begin(sum(cuts))
        for count in cuts:
            tokens = self.draw(count)
            self.step(*tokens)
            if oracle is not None:
                expected = np.stack([oracle.token(*token) for token in zip(*tokens, strict=True)], axis=2)
                np.testing.assert_allclose(self.output.numpy(), expected, atol=1e-9)
        evicted = cache.end_segment(self.slot)
        if oracle is not None:
            oracle.end()
        return evicted

    def step(self, query: np.ndarray, key: np.ndarray, value: np.ndarray) -> None:
        """A forward pass over some tokens of a segment, as drawn."""
        cache, count, self.steps = self.cache, len(query), self.steps + 1
        turned, keys, values = self.turned(query, key, value)
        cache.prepare(count)
        end = cache.n + count
        scale, log_n = self.shape.head_dim**-0.5, self.policy.log_n
        outputs = []
        for layer, q in enumerate(turned):
            k, v = cache.extend(layer, keys[layer], values[layer])
            records = cache.records(layer, end)
            if count == 1:
                batch = (t.unsqueeze(0) for t in (q[:, 0], k, v))
                records = [Record(record.state, record.into.unsqueeze(0)) for record in records]
                seen = torch.tensor([cache.seen])
                out = attend_decode(*batch, torch.tensor([end]), scale, records, seen, log_n).transpose(0, 1)
            else:
                out = attend_chunk(q, k, v, scale, records, cache.seen, log_n)
            outputs.append(out)
        cache.append(count)
        self.output = torch.stack(outputs)

    def turned(self, query: np.ndarray, key: np.ndarray, value: np.ndarray) -> tuple[torch.Tensor, ...]:
        """The next tokens' queries and keys, rotated to their positions, and values:
        `[layer, heads, count, head_dim]`."""
        positions = torch.tensor(self.cache.next_positions(len(query)))
        q, k, v = (torch.from_numpy(t).to(self.shape.dtype).permute(1, 2, 0, 3) for t in (query, key, value))
        return self.rotary.rotate(q, positions), self.rotary.rotate(k, positions), v

    def oracle(self) -> naive.Session:
        shape = self.shape
        own = {
            field.name: getattr(self.policy.rule, field.name)
            for field in dataclasses.fields(self.policy)
            if field.name not in Policy.__dataclass_fields__
        }
        return naive.Session(
            self.policy.name,
            own,
            self.policy.positions == "original",
            shape.layers,
            shape.kv_heads,
            shape.group,
            self.rotary.inv_freq.double().tolist(),
            shape.max_positions,
            self.policy.pins,
            self.policy.kivi,
            self.policy.residual,
        )

    def fresh_keys(self) -> np.ndarray:
        """The kept tokens' keys, rotated once, in float64, from where they started: [L, H, n, head_dim]."""
        cache, positions = self.cache, self.positions()
        turn = self.oracle().rotate
        fresh = np.zeros((*positions.shape, self.shape.head_dim))
        for layer, head, index in np.ndindex(*positions.shape):
            place = index if cache.rotated_in_cache else positions[layer, head, index]
            fresh[layer, head, index] = turn(self.keys[positions[layer, head, index]][layer, head], place)
        return fresh

    def positions(self) -> np.ndarray:
        return self.cache.buffers.position[:, :, : self.cache.n].numpy()


def views(memory: Buffers, of: Callable[[torch.Tensor], torch.Tensor]) -> Buffers:
    """The same memory, seen otherwise."""
    packed = memory.packed
    if packed is not None:
        names = ("key_codes", "value_codes", "key_grid", "value_grid", "channels")
        packed = dataclasses.replace(packed, **{name: of(getattr(packed, name)) for name in names})
    state = {name: of(tensor) for name, tensor in memory.state.items()}
    return Buffers(of(memory.keys), of(memory.values), of(memory.position), state, packed)


class Together:
    """Sessions whose memory is one pool, and whose single tokens attend in one batch."""

    def __init__(self, policy: Policy, shape: Shape, seeds: Sequence[int]) -> None:
        packed = 0 if policy.kivi is None else policy.bound
        memory = shape.memory(policy, shape.capacity, len(seeds), packed)
        self.pool = views(memory, lambda tensor: tensor.unflatten(0, (-1, shape.layers)))
        self.drivers = []
        for row, seed in enumerate(seeds):
            own = slice(row * shape.layers, (row + 1) * shape.layers)
            mine = views(memory, lambda tensor, own=own: tensor[own])  # type: ignore[misc]
            self.drivers.append(Driver(policy, shape, seed, workspace=mine))

    def segment(self) -> torch.Tensor:
        """One token in every session: their attention, `[session, layer, query_heads, head_dim]`."""
        caches, shape = [driver.cache for driver in self.drivers], self.drivers[0].shape
        policy, rotary = caches[0].policy, caches[0].rotary
        for cache in caches:
            cache.begin_segment(1)
        turned = [driver.turned(*driver.draw(1)) for driver in self.drivers]
        for cache in caches:
            cache.prepare(1)
        queries, keys, values = (torch.stack(t)[:, :, :, 0] for t in zip(*turned, strict=True))
        live, starts = self.pool, torch.tensor([cache.n for cache in caches])
        if live.packed is not None:
            counts = [cache.packed for cache in caches]
            (in_cache,) = {cache.rotated_in_cache for cache in caches}
            using = live.packed.using(torch.tensor(counts), max(counts), rotary, in_cache)
            live = dataclasses.replace(live, packed=using)
        most, seen = int(starts.max()) + 1, torch.tensor([cache.seen for cache in caches])
        output = torch.empty_like(queries)
        for layer in range(shape.layers):
            k, v = live.extend_each(layer, starts, most, keys[:, layer], values[:, layer])
            records = [Record(s, live.state[s.name][:, layer, :, :most]) for s in policy.states]
            query, scale = queries[:, layer], shape.head_dim**-0.5
            output[:, layer] = attend_decode(query, k, v, starts + 1, scale, records, seen, policy.log_n)
        for cache in caches:
            cache.append(1)
            cache.end_segment()
        return output


def held(cache: Cache) -> tuple[torch.Tensor, torch.Tensor]:
    """All keys, rotated, and values, those quantised as they are read: `[L, H, n, head_dim]`."""
    live = cache.live
    keys, values = zip(*(live.read(layer, cache.n) for layer in range(len(live.keys))), strict=True)
    return torch.stack(keys), torch.stack(values)


def assert_equal(mine: Cache, theirs: Cache, **tolerance: float) -> None:
    """Two caches hold the same: counts, keys, values, positions and states; exactly, unless told."""
    assert mine.state() == theirs.state()
    a, b, n = mine.buffers, theirs.buffers, mine.n
    assert a.state.keys() == b.state.keys()
    pairs = [(a.position, b.position), *((a.state[name], b.state[name]) for name in a.state)]
    pairs = [(x[:, :, :n], y[:, :, :n]) for x, y in pairs] + list(zip(held(mine), held(theirs), strict=True))
    for x, y in pairs:
        torch.testing.assert_close(x, y, **(tolerance or {"rtol": 0, "atol": 0}))


def assert_same(driver: Driver, oracle: naive.Session) -> None:
    """The library's cache is the naive one: the same tokens, counts, scores and keys."""
    cache = driver.cache
    assert (cache.n, cache.sampled, cache.seen, cache.evicted, cache.packed) == (
        oracle.n,
        oracle.sampled,
        oracle.seen,
        oracle.evicted,
        oracle.packed,
    )
    assert cache.rotated_in_cache == oracle.in_cache
    if not cache.n:
        return
    heads = [[head.entries for head in layer] for layer in oracle.heads]

    def expected(read: Callable[[Entry], object]) -> list[list[list[object]]]:
        return [[[read(entry) for entry in entries] for entries in layer] for layer in heads]

    np.testing.assert_array_equal(driver.positions(), expected(lambda entry: entry.position))
    live = {name: state[:, :, : cache.n].numpy() for name, state in cache.buffers.state.items()}
    if "score" in live:
        scores = expected(lambda entry: entry.score)
        np.testing.assert_allclose(live["score"], scores, rtol=1e-9, atol=1e-12)
    if "vote" in live:
        np.testing.assert_array_equal(live["vote"], expected(lambda entry: entry.mattered[-1]))
    assert live.keys() <= {"score", "vote"}
    np.testing.assert_allclose(
        held(cache)[1].numpy(), expected(lambda entry: entry.value), rtol=0, atol=1e-12
    )
