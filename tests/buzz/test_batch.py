from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from buzz import Cache, Rotary, parse
from buzz.batch import Batch
from buzz.quant import BLOCK, GROUP
from tests.buzz.driver import Driver, Shape, assert_same, held

SHAPE = Shape(layers=3, kv_heads=2, group=2, max_positions=130)
WIDE = Shape(layers=2, kv_heads=2, group=2, head_dim=GROUP, max_positions=130)
QUANTISED = (
    "h2o(heavy=20,recent=40,block=3,kivi=4,residual=8)",
    "streaming(sink=2,window=58,block=4,kivi=2,residual=0,positions=original)",
)
SPECS = (
    "buzz(sink=2,window=8,threshold=12,stride=4)",
    "h2o(heavy=8,recent=10,block=3,positions=original)",
    "streaming(sink=2,window=16,block=4)",
)


def batch_of(drivers: list[Driver]) -> Batch:
    shape = drivers[0].shape
    like = torch.empty(len(drivers), shape.kv_heads, 0, shape.head_dim, dtype=shape.dtype)
    return Batch(drivers[0].policy, drivers[0].rotary, shape.layers, like)


def turned(rotary: Rotary, tensors: Tensor, position: Tensor) -> Tensor:
    """`[T, L, heads, head_dim]` as a model hands it over: `[L, heads, T, head_dim]`, rotated."""
    return rotary.rotate(tensors.permute(1, 2, 0, 3), position)


@pytest.mark.parametrize("spec", SPECS + QUANTISED)
def test_sessions_of_a_batch_are_the_naive_sessions(spec: str) -> None:
    random = np.random.default_rng(1)
    policy = parse(spec)
    shape = SHAPE if policy.kivi is None else WIDE
    drivers = [Driver(policy, shape, seed=row) for row in range(3)]
    oracles = [driver.oracle() for driver in drivers]
    batch = batch_of(drivers)
    at, mixed = torch.zeros(3, dtype=torch.int64), False
    for segment in range(150):
        columns = int(random.integers(2, 30)) if segment % 40 == 0 else 1
        real = torch.from_numpy(random.random((3, columns)) < (0.8 if segment % 7 == 0 else 1))
        given = torch.from_numpy(random.integers(0, 100, (3, columns)))  # any; the batch moves them
        held = [
            torch.zeros(shape.layers, heads, columns, shape.head_dim, dtype=shape.dtype)
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
                work.attend(layer, *(part[:, layer] for part in inputs), shape.head_dim**-0.5)
                for layer in range(shape.layers)
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
        memory = batch.memory
        assert memory.capacity <= policy.bound + 1
        assert memory.dense <= (policy.bound + 1 if policy.kivi is None else policy.residual + BLOCK)
        mixed |= len({cache.rotated_in_cache for cache in batch.caches}) == 2
    assert min(cache.evicted for cache in batch.caches) > 100
    assert [cache.packed > 0 for cache in batch.caches] == [policy.kivi is not None] * 3
    assert mixed == (policy.positions == "original")


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


def test_quantised_entries_stay_so_in_a_workspace() -> None:
    """Else a session's outcome would depend on whether another one of its batch needs a workspace."""
    policy = parse("streaming(sink=4,window=200,block=8,kivi=4,residual=40)")
    batch = Batch(policy, Rotary.of(GROUP, 400), 1, torch.zeros(2, 1, 5, GROUP))
    random = torch.Generator().manual_seed(0)

    def run(*counts: int) -> tuple[int, int, int]:
        """The sizes of the memory in which the segment ran."""
        columns = max(counts)
        real = torch.arange(columns) >= columns - torch.tensor(counts).unsqueeze(1)
        work = batch.begin(real, torch.zeros(2, columns, dtype=torch.int64))
        memory = batch.memory
        work.attend(0, *torch.randn(3, 2, 1, columns, GROUP, generator=random), 1.0)
        work.end()
        return memory.capacity, memory.packed.capacity, memory.dense

    def at_rest() -> tuple[int, int, int]:
        memory = batch.memory
        entries = memory.capacity * 4 + memory.dense * 2 * GROUP * 4  # positions; keys and values in float32
        few = memory.packed.capacity * 2 * (GROUP // 2 + 2 * 2)  # half a byte a channel, a minimum and a step
        assert batch.nbytes == 2 * (entries + few + 2 * GROUP * 2)  # and the key channels' ranges
        return memory.capacity, memory.packed.capacity, memory.dense

    def packed() -> list[int]:
        return [cache.packed for cache in batch.caches]

    assert (run(60, 50), packed()) == ((64, 24, 64), [0, 0])
    assert (run(12, 1), packed()) == ((144, 104, 72), [32, 0])
    assert at_rest() == (144, 104, 72)
    first = [tensor[0, :, :, :32].clone() for tensor in batch.memory.packed.tensors[:-1]]
    assert (run(1, 60), packed()) == ((111, 32, 111), [32, 71])  # alone the first would not need it
    assert at_rest() == (111, 71, 72)
    assert run(0, 100) == (211, 71, 140)
    assert packed() == [32, batch.caches[1].n - 40]
    assert at_rest() == (205, 164, 72)
    for tensor, codes in zip(batch.memory.packed.tensors, first, strict=False):
        assert tensor[0, :, :, :32].equal(codes)
    twin = batch.select([1, 0, 1])
    assert [cache.packed for cache in twin.caches] == [packed()[i] for i in (1, 0, 1)]
    for copied, source in zip(twin.caches, (1, 0, 1), strict=True):
        original = batch.caches[source]
        for mine, theirs in zip(held(copied), held(original), strict=True):
            assert mine.equal(theirs)


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
