from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from buzz import Cache, Rotary, parse
from buzz.batch import Batch
from tests.buzz.driver import Driver, Shape, assert_same

SHAPE = Shape(layers=3, kv_heads=2, group=2, max_positions=200)
SPECS = (
    "buzz(sink=2,window=8,threshold=12,stride=4)",
    "h2o(heavy=8,recent=10,block=3,positions=original)",
    "streaming(sink=2,window=16,block=4)",
)


def batch_of(drivers: list[Driver]) -> Batch:
    like = torch.empty(len(drivers), SHAPE.kv_heads, 0, SHAPE.head_dim, dtype=SHAPE.dtype)
    return Batch(drivers[0].policy, drivers[0].rotary, SHAPE.layers, like)


def turned(rotary: Rotary, tensors: Tensor, position: Tensor) -> Tensor:
    """`[T, L, heads, head_dim]` as a model hands it over: `[L, heads, T, head_dim]`, rotated."""
    return rotary.rotate(tensors.permute(1, 2, 0, 3), position)


@pytest.mark.parametrize("spec", SPECS)
def test_sessions_of_a_batch_are_the_naive_sessions(spec: str) -> None:
    random = np.random.default_rng(1)
    drivers = [Driver(parse(spec), SHAPE, seed=row) for row in range(3)]
    oracles = [driver.oracle() for driver in drivers]
    batch = batch_of(drivers)
    at = torch.zeros(3, dtype=torch.int64)
    for segment in range(150):
        columns = int(random.integers(2, 30)) if segment % 40 == 0 else 1
        real = torch.from_numpy(random.random((3, columns)) < (0.8 if segment % 7 == 0 else 1))
        given = torch.from_numpy(random.integers(0, 100, (3, columns)))  # any; the batch moves them
        held = [
            torch.zeros(SHAPE.layers, heads, columns, SHAPE.head_dim, dtype=SHAPE.dtype)
            for heads in (4, 2, 2)
        ]
        inputs = [torch.stack([part] * 3) for part in held]
        expected = []
        for row, (driver, oracle) in enumerate(zip(drivers, oracles, strict=True)):
            here = real[row]
            count = int(here.sum())
            if count == 0:
                continue
            oracle.begin(count)
            drawn = driver.draw(count)
            expected.append((row, here, [oracle.token(*token) for token in zip(*drawn, strict=True)]))
            oracle.end()
            for name, (into, tensor) in enumerate(zip(inputs, drawn, strict=True)):
                parts = torch.from_numpy(tensor)
                moved = turned(driver.rotary, parts, given[row, here] if name < 2 else given[row, here] * 0)
                into[row][:, :, here] = moved
        at += real.sum(dim=1)
        work = batch.begin(real, given)
        outputs = torch.stack(
            [
                work.attend(layer, *(part[:, layer] for part in inputs), SHAPE.head_dim**-0.5)
                for layer in range(3)
            ]
        )
        work.end()
        for row, here, values in expected:
            got = outputs[:, row, here].transpose(0, 1).numpy()
            np.testing.assert_allclose(got, np.stack(values), atol=1e-9)
        assert [cache.seen for cache in batch.caches] == at.tolist()
        for driver, oracle, cache in zip(drivers, oracles, batch.caches, strict=True):
            driver.cache = cache
            assert_same(driver, oracle)
        assert batch.memory.capacity <= batch.policy.bound + 1
    assert min(cache.evicted for cache in batch.caches) > 100


def test_memory_grows_by_steps_and_a_workspace_goes() -> None:
    batch = Batch(parse("full(bound=180)"), Rotary.of(4, 200), 2, torch.zeros(2, 1, 5, 4))
    capacities, entry = [], 2 * 2 * (2 * 4 * 4 + 4)
    for _ in range(180):
        batch.begin(torch.ones(2, 1, dtype=torch.bool), torch.zeros(2, 1, dtype=torch.int64)).end()
        capacities.append(batch.memory.capacity)
        assert batch.nbytes == batch.memory.capacity * entry
    assert sorted(set(capacities)) == [64, 144, 181]
    batch = Batch(parse("streaming(sink=1,window=9,block=1)"), Rotary.of(4, 200), 2, torch.zeros(2, 1, 5, 4))
    work = batch.begin(torch.ones(2, 50, dtype=torch.bool), torch.zeros(2, 50, dtype=torch.int64))
    assert batch.memory.capacity == 50
    work.end()
    assert (batch.memory.capacity, [cache.n for cache in batch.caches]) == (11, [10, 10])


def test_a_selection_is_a_copy() -> None:
    batch = Batch(parse(SPECS[0]), Rotary.of(4, 200), 2, torch.zeros(2, 1, 5, 4))
    real = torch.tensor([[True] * 9, [False] * 4 + [True] * 5])
    work = batch.begin(real, torch.zeros(2, 9, dtype=torch.int64))
    parts = torch.randn(3, 2, 1, 9, 4)
    for layer in range(2):
        work.attend(layer, *parts, 1.0)
    work.end()
    twin = batch.select([1, 1, 0])
    assert [cache.seen for cache in twin.caches] == [5, 5, 9]
    batch.memory.keys.zero_()
    for row, source in ((0, 1), (1, 1), (2, 0)):
        cache: Cache = twin.caches[row]
        expected = parts[2, source][:, real[source]]
        assert cache.buffers.values[1, :, : cache.n].equal(expected)
        assert cache.buffers.keys[1, :, : cache.n].abs().sum() > 0
