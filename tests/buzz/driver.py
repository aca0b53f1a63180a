"""Drives the library's cache with random tokens, as an engine would, beside the naive restatement."""

from __future__ import annotations

import dataclasses
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


@dataclasses.dataclass
class Shape:
    layers: int = 1
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 4
    max_positions: int = 4096
    capacity: int = 256
    dtype: torch.dtype = torch.float64


class Driver:
    """One session of the library; tokens come from `seed`, so two drivers see the same text."""

    def __init__(self, policy: Policy, shape: Shape, seed: int = 0, slot: bool = False) -> None:
        self.shape = shape
        self.policy = policy
        self.random = np.random.default_rng(seed)
        self.rotary = Rotary.of(shape.head_dim, shape.max_positions, theta=100.0)
        self.workspace = self.memory(shape.capacity)
        self.slot = self.memory(policy.bound + 8) if slot else None
        self.cache = Cache(policy, self.rotary, self.workspace)
        self.keys: list[np.ndarray] = []  # unrotated, [layer, kv_heads, head_dim] of each token ever seen
        self.steps = 0

    def memory(self, capacity: int) -> Buffers:
        shape = self.shape
        size = (shape.layers, shape.kv_heads, capacity, shape.head_dim)
        buffers = Buffers.empty(*size, shape.dtype, "cpu", self.policy.states)
        buffers.keys.fill_(torch.nan)  # nothing may depend on memory that was never written
        return buffers

    def draw(self, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
            output = self.step(count, *(torch.from_numpy(t).to(self.shape.dtype) for t in tokens))
            if oracle is not None:
                expected = np.stack([oracle.token(*token) for token in zip(*tokens, strict=True)])
                np.testing.assert_allclose(output.numpy(), expected, atol=1e-9)
        evicted = cache.end_segment(self.slot)
        if oracle is not None:
            oracle.end()
        return evicted

    def step(self, count: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        cache, shape = self.cache, self.shape
        self.steps += 1
        positions = torch.tensor(cache.next_positions(count))
        cache.prepare(count)
        buffers, start, end = cache.buffers, cache.n, cache.n + count
        outputs = []
        for layer in range(shape.layers):
            q, k, v = (t[:, layer].transpose(0, 1) for t in (query, key, value))
            q = self.rotary.rotate(q, positions)
            buffers.keys[layer, :, start:end] = self.rotary.rotate(k, positions)
            buffers.values[layer, :, start:end] = v
            keys, values = buffers.keys[layer, :, :end], buffers.values[layer, :, :end]
            records = cache.records(layer, end)
            scale, log_n = shape.head_dim**-0.5, self.policy.log_n
            if count == 1:
                batch = (t.unsqueeze(0) for t in (q[:, 0], keys, values))
                records = [Record(record.state, record.into.unsqueeze(0)) for record in records]
                seen = torch.tensor([cache.seen])
                out = attend_decode(*batch, torch.tensor([end]), scale, records, seen, log_n).transpose(0, 1)
            else:
                out = attend_chunk(q, keys, values, scale, records, cache.seen, log_n)
            outputs.append(out)
        cache.append(count)
        return torch.stack(outputs).permute(2, 0, 1, 3)

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
