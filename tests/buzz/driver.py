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

    def memory(self, policy: Policy, capacity: int, sessions: int = 1) -> Buffers:
        """Fresh memory, the layers of one session after the other's; of NaN, on which nothing may depend."""
        size = (sessions * self.layers, self.kv_heads, capacity, self.head_dim)
        buffers = Buffers.empty(*size, self.dtype, "cpu", policy.states)
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
        self.workspace = workspace or self.memory(shape.capacity)
        self.slot = self.memory(policy.bound + 8) if slot else None
        self.cache = Cache(policy, self.rotary, self.workspace)
        self.keys: list[np.ndarray] = []  # unrotated, [layer, kv_heads, head_dim] of each token ever seen
        self.steps = 0
        self.output = torch.empty(0)  # of the last step, [layer, query_heads, count, head_dim]

    def memory(self, capacity: int) -> Buffers:
        return self.shape.memory(self.policy, capacity)

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
        turned, buffers, end = self.write(query, key, value), cache.buffers, cache.n + count
        scale, log_n = self.shape.head_dim**-0.5, self.policy.log_n
        outputs = []
        for layer, q in enumerate(turned):
            keys, values = buffers.keys[layer, :, :end], buffers.values[layer, :, :end]
            records = cache.records(layer, end)
            if count == 1:
                batch = (t.unsqueeze(0) for t in (q[:, 0], keys, values))
                records = [Record(record.state, record.into.unsqueeze(0)) for record in records]
                seen = torch.tensor([cache.seen])
                out = attend_decode(*batch, torch.tensor([end]), scale, records, seen, log_n).transpose(0, 1)
            else:
                out = attend_chunk(q, keys, values, scale, records, cache.seen, log_n)
            outputs.append(out)
        cache.append(count)
        self.output = torch.stack(outputs)

    def write(self, query: np.ndarray, key: np.ndarray, value: np.ndarray) -> torch.Tensor:
        """Place new entries; returns the queries turned to their positions, `[layer, heads, count, dim]`."""
        cache, count = self.cache, len(query)
        positions = torch.tensor(cache.next_positions(count))
        cache.prepare(count)
        q, k, v = (torch.from_numpy(t).to(self.shape.dtype).permute(1, 2, 0, 3) for t in (query, key, value))
        cache.buffers.keys[:, :, cache.n : cache.n + count] = self.rotary.rotate(k, positions)
        cache.buffers.values[:, :, cache.n : cache.n + count] = v
        return self.rotary.rotate(q, positions)

    def oracle(self) -> naive.Session:
        shape = self.shape
        own = {
            field.name: getattr(self.policy, field.name)
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


class Together:
    """Sessions whose memory is one pool, and whose single tokens attend in one batch."""

    def __init__(self, policy: Policy, shape: Shape, seeds: Sequence[int]) -> None:
        self.pool = shape.memory(policy, shape.capacity, len(seeds))
        self.drivers = []
        for row, seed in enumerate(seeds):
            own = slice(row * shape.layers, (row + 1) * shape.layers)
            state = {name: memory[own] for name, memory in self.pool.state.items()}
            memory = Buffers(self.pool.keys[own], self.pool.values[own], self.pool.position[own], state)
            self.drivers.append(Driver(policy, shape, seed, workspace=memory))

    def segment(self) -> torch.Tensor:
        """One token in every session: their attention, `[session, layer, query_heads, head_dim]`."""
        caches, shape = [driver.cache for driver in self.drivers], self.drivers[0].shape
        for cache in caches:
            cache.begin_segment(1)
        queries = torch.stack([driver.write(*driver.draw(1))[:, :, 0] for driver in self.drivers])
        lengths = torch.tensor([cache.n + 1 for cache in caches])
        seen = torch.tensor([cache.seen for cache in caches])
        end, policy = int(lengths.max()), caches[0].policy
        output = torch.empty_like(queries)
        for layer in range(shape.layers):

            def rows(memory: torch.Tensor, layer: int = layer) -> torch.Tensor:
                return memory.unflatten(0, (-1, shape.layers))[:, layer, :, :end]

            records = [Record(state, rows(self.pool.state[state.name])) for state in policy.states]
            output[:, layer] = attend_decode(
                queries[:, layer],
                rows(self.pool.keys),
                rows(self.pool.values),
                lengths,
                shape.head_dim**-0.5,
                records,
                seen,
                policy.log_n,
            )
        for cache in caches:
            cache.append(1)
            cache.end_segment()
        return output


def assert_equal(mine: Cache, theirs: Cache, **tolerance: float) -> None:
    """Two caches hold the same: counts, keys, values, positions and states; exactly, unless told."""
    assert mine.state() == theirs.state()
    a, b, n = mine.buffers, theirs.buffers, mine.n
    assert a.state.keys() == b.state.keys()
    pairs = [(a.position, b.position), (a.keys, b.keys), (a.values, b.values)]
    pairs += [(a.state[name], b.state[name]) for name in a.state]
    for x, y in pairs:
        torch.testing.assert_close(x[:, :, :n], y[:, :, :n], **(tolerance or {"rtol": 0, "atol": 0}))


def assert_same(driver: Driver, oracle: naive.Session) -> None:
    """The library's cache is the naive one: the same tokens, counts, scores and keys."""
    cache = driver.cache
    assert (cache.n, cache.sampled, cache.seen, cache.evicted) == (
        oracle.n,
        oracle.sampled,
        oracle.seen,
        oracle.evicted,
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
    values = cache.buffers.values[:, :, : cache.n].numpy()
    np.testing.assert_allclose(values, expected(lambda entry: entry.value), rtol=0, atol=1e-12)
