"""Every registered policy x positions x quantisation: the promises that all of them keep."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from buzz import Cache, CacheState, Kind, Policy, names, parse
from buzz.quant import BLOCK
from tests.buzz.driver import Driver, Shape, Together, assert_equal, assert_same, segments

# Small enough that a few hundred tokens compact often; several where options change the rule.
SMALL = {
    "buzz": (
        "buzz(sink=4,window=12,threshold=24,stride=5)",
        "buzz(sink=0,window=12,threshold=24,stride=4,accumulate=false,log_n=16)",
    ),
    "buzz2": (
        "buzz2(sink=3,window=7,hot=12,cells=18,horizon=9,block=6)",
        "buzz2(sink=0,window=9,hot=0,cells=31,horizon=2,mean=true,values=false,block=7)",
        "buzz2(sink=1,window=4,hot=35,cells=0,horizon=none,mean=true,block=1)",
        "buzz2(sink=1,window=4,hot=20,cells=15,horizon=none,values=false,block=9)",
    ),
    "cascade": (
        "cascade(sink=3,cascades=4,size=9,block=4)",
        "cascade(sink=4,cascades=3,size=12,halve=true,block=12)",
    ),
    "corm": ("corm(budget=40,recent=8,queries=4,block=5)",),
    "elastic": ("elastic(sink=3,heavy=35,recent=2,distance=6,block=5)",),
    "full": ("full(bound=120)",),
    "h2o": ("h2o(heavy=20,recent=20,block=6)",),
    "streaming": ("streaming(sink=3,window=37,block=7)",),
    "window": ("window(window=40,block=1)",),
}
POSITIONS = ("in_cache", "original")
QUANT = ("none", "kivi=4,residual=3", "kivi=2,residual=3")
PINNED = {
    "full": ",kivi=4,residual=3,pinned=5)",
    "h2o": ",kivi=4,residual=3,pinned=5)",
}  # the others: without kivi
TRAINED = 160  # positions of the model: with `original`, sessions change over on the way

matrix = pytest.mark.parametrize(
    "policy",
    [
        parse(spec.replace(")", f",positions={positions}{'' if quant == 'none' else ',' + quant})"))
        for specs in SMALL.values()
        for spec in specs
        for positions in POSITIONS
        for quant in QUANT
    ]
    + [parse(specs[0].replace(")", PINNED.get(name, ",pinned=5)"))) for name, specs in SMALL.items()],
    ids=str,
)


def shape_for(policy: Policy, layers: int = 1) -> Shape:
    return Shape(layers=layers, max_positions=TRAINED, head_dim=4 if policy.kivi is None else 32)


def text(policy: Policy, seed: int, steps: int) -> list[list[int]]:
    """Segments; fewer where entries are quantised, since wider heads take longer."""
    return segments(seed, steps if policy.kivi is None else steps // 3)


def driver_of(policy: Policy, slot: bool = False) -> Driver:
    """A session at rest in a slot, which prompts leave for a workspace, or in one memory.

    A workspace quantises nothing, and on the way back up to `BLOCK` entries more than in one memory are: so
    with quantisation the two differ.
    """
    return Driver(policy, shape_for(policy), seed=1, slot=slot and policy.kivi is None)


def fits(driver: Driver, cuts: list[int]) -> bool:
    """Whether a segment may follow: policies that never evict end at their bound."""
    return driver.policy.evicts or driver.cache.n + sum(cuts) <= driver.policy.bound


def test_no_policy_is_left_out() -> None:
    assert SMALL.keys() == set(names())
    assert all(parse(spec).name == name for name, specs in SMALL.items() for spec in specs)


@matrix
def test_the_bound_holds_and_order_is_kept_at_every_rest(policy: Policy) -> None:
    driver, compactions = Driver(policy, shape_for(policy), seed=1, slot=True), 0
    for cuts in text(policy, seed=2, steps=210):
        if not fits(driver, cuts):
            continue
        compactions += driver.segment(cuts) > 0
        cache, positions = driver.cache, driver.positions()
        assert cache.n <= policy.bound
        assert cache.n + cache.evicted == cache.seen
        assert (np.diff(positions, axis=-1) > 0).all()
        assert (positions[..., -1] == cache.seen - 1).all()
        assert (positions[..., : policy.pins] == np.arange(cache.n)[: policy.pins]).all()
        most = cache.n if policy.kivi is None else policy.residual + BLOCK - 1
        assert cache.n - cache.packed <= most
    assert compactions > 2 or not policy.evicts
    assert driver.cache.rotated_in_cache == (policy.positions == "in_cache" or driver.cache.seen > TRAINED)


@matrix
def test_two_runs_are_bit_equal(policy: Policy) -> None:
    one, other = driver_of(policy), driver_of(policy)
    for cuts in text(policy, seed=3, steps=90):
        if fits(one, cuts):
            one.segment(cuts)
            other.segment(cuts)
    assert_equal(one.cache, other.cache)
    torch.testing.assert_close(one.output, other.output, rtol=0, atol=0)


@matrix
def test_the_outcome_does_not_depend_on_the_cuts(policy: Policy) -> None:
    cut, whole = driver_of(policy), driver_of(policy, slot=True)
    for cuts in text(policy, seed=4, steps=120):
        if fits(cut, cuts):
            assert cut.segment(cuts) == whole.segment([sum(cuts)])
            assert_equal(cut.cache, whole.cache, rtol=1e-9, atol=1e-12)


@matrix
def test_a_session_in_a_batch_is_the_session_alone(policy: Policy) -> None:
    shape = shape_for(policy, layers=2)
    seeds, prompts = (5, 6, 7), (100, 1, 60)
    together = Together(policy, shape, seeds)
    alone = [Driver(policy, shape, seed) for seed in seeds]
    for prompt, mine, theirs in zip(prompts, together.drivers, alone, strict=True):
        mine.segment([prompt])
        theirs.segment([prompt])
    for _ in range(20):
        output = together.segment()
        for row, mine, theirs in zip(output, together.drivers, alone, strict=True):
            theirs.segment([1])
            torch.testing.assert_close(row, theirs.output[:, :, 0], rtol=0, atol=1e-9)
            np.testing.assert_array_equal(mine.positions(), theirs.positions())
    for mine, theirs in zip(together.drivers, alone, strict=True):
        assert_equal(mine.cache, theirs.cache, rtol=1e-9, atol=1e-9)


@matrix
def test_a_session_that_was_saved_and_loaded_goes_on_as_if_it_had_not_been(policy: Policy) -> None:
    straight, loaded = driver_of(policy), driver_of(policy)
    for i, cuts in enumerate(text(policy, seed=9, steps=150)):
        if i in (10, 30, 80):  # before and after the changeover
            memory, saved = loaded.memory(256), json.dumps(dataclasses.asdict(loaded.cache.state()))
            memory.copy_from(loaded.cache.buffers, loaded.cache.n, loaded.cache.packed)
            loaded.cache = Cache(policy, loaded.rotary, memory)
            loaded.cache.restore(CacheState(**json.loads(saved)))
        if fits(straight, cuts):
            assert straight.segment(cuts) == loaded.segment(cuts)
            torch.testing.assert_close(straight.output, loaded.output, rtol=0, atol=0)
    assert_equal(straight.cache, loaded.cache)


@matrix
def test_it_is_its_naive_restatement(policy: Policy) -> None:
    driver = driver_of(policy, slot=True)
    oracle = driver.oracle()
    for cuts in text(policy, seed=10, steps=270):
        if fits(driver, cuts):
            driver.segment(cuts, oracle)
            assert_same(driver, oracle)


SINKS = {"buzz": 4, "buzz2": 3, "cascade": 3, "elastic": 3, "streaming": 3}
CHOSEN = {
    "buzz": {Kind.SAMPLED},
    "buzz2": {Kind.CELL},
    "cascade": {Kind.CELL},
    "corm": {Kind.HEAVY},
    "elastic": {Kind.HEAVY},
    "h2o": {Kind.HEAVY},
}
WINDOWS = {  # of policies that always keep just so many
    "buzz": 12,
    "buzz2": 7,
    "corm": 8,
    "elastic": 2,
    "h2o": 20,
}


@pytest.mark.parametrize("policy", [parse(specs[0]) for specs in SMALL.values()], ids=str)
def test_entries_are_of_the_kinds_that_it_says(policy: Policy) -> None:
    driver, kinds = Driver(policy, shape_for(policy), seed=1), set[Kind]()
    choices = CHOSEN.get(policy.name, set())
    for cuts in segments(seed=11, steps=210):
        if not fits(driver, cuts):
            continue
        compacted = driver.segment(cuts) > 0
        cache, positions = driver.cache, driver.positions()
        regions = policy.regions(cache.n, cache.sampled, cache.seen)
        assert [each.start for each in regions] == [0, *(each.stop for each in regions[:-1])]
        assert regions[-1].stop == cache.n
        lengths = {each.kind: each.stop - each.start for each in regions}
        assert len(lengths) == len(regions) == sum(length > 0 for length in lengths.values())
        kinds |= lengths.keys()
        assert Kind.MIDDLE not in lengths or not compacted, "a compaction has judged all that it may"
        assert (not choices.isdisjoint(lengths)) == (cache.evicted > 0 and bool(choices))
        sinks = lengths.get(Kind.SINK, 0)
        assert sinks == min(cache.n, SINKS.get(policy.name, 0))
        assert (positions[..., :sinks] == np.arange(sinks)).all()
        window = lengths.get(Kind.WINDOW, 0)
        recent = lengths.get(Kind.MIDDLE, 0) + window
        assert (positions[..., cache.n - recent :] == np.arange(cache.seen - recent, cache.seen)).all()
        most = WINDOWS.get(policy.name, policy.bound if policy.name != "cascade" else 9)
        assert window <= most
        assert policy.name not in WINDOWS or window == min(cache.n - sinks, most)
    between = set() if policy.name in ("full", "streaming", "window") else {Kind.MIDDLE}
    assert kinds == {Kind.WINDOW} | choices | between | ({Kind.SINK} if policy.name in SINKS else set())


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("positions", POSITIONS)
def test_a_policy_returns_from_its_specification_at_any_bound(name: str, positions: str) -> None:
    policy = dataclasses.replace(parse(name), positions=positions)
    if policy.bound is None:
        policy = policy.resolve(8192)
    assert parse(str(policy)) == policy
    for bound in (100, 141, 200, 333, 564, 1001, 8000):
        sized = policy.sized(bound)
        assert sized.bound == bound
        assert (sized.name, sized.positions) == (name, positions)
        assert parse(str(sized)) == sized
    assert policy.sized(policy.bound) == policy
