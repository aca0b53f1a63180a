from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buzz import Buffers, Cache, Compaction, Full, Policy, Rotary, State, Streaming, View, parse
from tests.buzz.driver import Driver, Shape, assert_equal, assert_same, segments
from tests.buzz.strategies import policies

SMALL = "buzz(sink=4,window=16,threshold=40,stride=5)"


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (SMALL, Shape(layers=2, kv_heads=1, group=1)),
        (SMALL, Shape(kv_heads=3, group=3)),
        ("streaming(sink=3,window=30,block=1,positions=original)", Shape(kv_heads=1, max_positions=500)),
    ],
    ids=str,
)
def test_many_steps_equal_the_naive_restatement(spec: str, shape: Shape) -> None:
    driver = Driver(parse(spec), shape, seed=1, slot=True)
    oracle = driver.oracle()
    for cuts in segments(seed=2, steps=600):
        driver.segment(cuts, oracle)
        assert_same(driver, oracle)
        assert driver.cache.n <= driver.cache.policy.bound
    assert driver.steps >= 600
    assert driver.cache.evicted > 1000


@pytest.mark.parametrize(
    "spec", [SMALL, "h2o(heavy=20,recent=20,block=4)", "streaming(sink=4,window=40,block=2)"]
)
@pytest.mark.parametrize("mode", ["in_cache", "original"])
def test_float32_keys_equal_freshly_rotated_keys_after_a_thousand_steps(spec: str, mode: str) -> None:
    policy = parse(spec.replace(")", f",positions={mode})"))
    driver = Driver(policy, Shape(kv_heads=3, group=2, max_positions=900, dtype=torch.float32), seed=3)
    for cuts in segments(seed=4, steps=1000):
        driver.segment(cuts)
    keys = driver.cache.buffers.keys[:, :, : driver.cache.n]
    assert driver.cache.rotated_in_cache
    np.testing.assert_allclose(keys.numpy(), driver.fresh_keys(), atol=1e-4, rtol=0)


def test_bfloat16_keys_drift_by_a_few_roundings_only() -> None:
    driver = Driver(parse(SMALL), Shape(dtype=torch.bfloat16), seed=3)
    for cuts in segments(seed=4, steps=1000):
        driver.segment(cuts)
    keys, fresh = driver.cache.buffers.keys[:, :, : driver.cache.n].double().numpy(), driver.fresh_keys()
    drift = np.abs(keys - fresh).max() / np.abs(fresh).max()
    assert 0 < drift < 8 * 2**-8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_norms_of_values_are_taken_wide(dtype: torch.dtype) -> None:
    """These differ by less than a bfloat16 tells apart, and their squares are more than a float16 holds."""
    policy = parse("buzz2(sink=0,window=0,hot=2,cells=0,block=1)")
    buffers = Buffers.empty(1, 1, 3, 2, dtype, "cpu", policy.states)
    cache = Cache(policy, Rotary.of(2, 100), buffers)
    cache.begin_segment(3)
    cache.prepare(3)
    buffers.values[0, 0] = torch.tensor([[256.0, 0], [256, 16], [256, 20]])
    buffers.state["score"].fill_(1)
    cache.append(3)
    cache.end_segment()
    assert buffers.position[0, 0, :2].tolist() == [1, 2]


def test_original_positions_hold_until_the_changeover() -> None:
    driver = Driver(parse("buzz(sink=1,window=4,threshold=10,positions=original)"), Shape(max_positions=100))
    oracle = driver.oracle()
    for _ in range(100):
        assert list(driver.cache.next_positions(1)) == [driver.cache.seen]
        assert not driver.cache.changes_over(1)
        driver.segment([1], oracle)
        np.testing.assert_allclose(
            driver.cache.buffers.keys[:, :, : driver.cache.n].numpy(), driver.fresh_keys(), atol=1e-12
        )
    assert driver.cache.changes_over(1)
    driver.segment([1], oracle)
    assert driver.cache.rotated_in_cache
    assert not driver.cache.changes_over(10_000)
    assert list(driver.cache.next_positions(2)) == [driver.cache.n, driver.cache.n + 1]
    np.testing.assert_allclose(
        driver.cache.buffers.keys[:, :, : driver.cache.n].numpy(), driver.fresh_keys(), atol=1e-12
    )
    assert_same(driver, oracle)


cuttings = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4), min_size=1, max_size=8)


@settings(max_examples=80, deadline=None)
@given(
    policy=policies,
    cuttings=cuttings,
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 4),
    max_positions=st.integers(120, 600),
    slot=st.booleans(),
)
def test_any_policy_and_any_lengths_equal_the_naive_restatement(
    policy: Policy, cuttings: list[list[int]], kv_heads: int, group: int, max_positions: int, slot: bool
) -> None:
    shape = Shape(kv_heads=kv_heads, group=group, capacity=400, max_positions=max_positions)
    driver = Driver(policy, shape, seed=5, slot=slot)
    oracle = driver.oracle()
    for cuts in cuttings:
        if driver.cache.n + sum(cuts) > min(max_positions, policy.bound + 100):
            break
        driver.segment(cuts, oracle)
        assert_same(driver, oracle)
        assert driver.cache.n <= policy.bound


@settings(max_examples=40, deadline=None)
@given(policy=policies, cuttings=cuttings)
def test_the_outcome_does_not_depend_on_the_cuts(policy: Policy, cuttings: list[list[int]]) -> None:
    shape = Shape(capacity=400)
    cut, whole = Driver(policy, shape, seed=6, slot=True), Driver(policy, shape, seed=6)
    for cuts in cuttings:
        if cut.cache.n + sum(cuts) > min(180, policy.bound + 100):
            break
        assert cut.segment(cuts) == whole.segment([sum(cuts)])
        assert_equal(cut.cache, whole.cache, rtol=1e-9, atol=1e-12)


def ready(policy: Policy, capacity: int = 64, max_positions: int = 100) -> Driver:
    return Driver(policy, Shape(capacity=capacity, max_positions=max_positions))


def test_a_prompt_shorter_than_the_sink_stays_whole() -> None:
    driver = ready(parse("buzz(sink=8,window=0,threshold=1)"))
    assert driver.segment([2, 3]) == 0
    assert (driver.cache.n, driver.cache.sampled) == (5, 0)


def test_a_segment_past_the_model_is_refused_and_changes_nothing() -> None:
    driver = ready(Full(bound=100), capacity=200)
    driver.segment([90])
    before = driver.cache.state()
    for count in (0, -1, 11):
        with pytest.raises(ValueError, match="a segment has 1 to 10 tokens here"):
            driver.cache.begin_segment(count)
    assert driver.cache.state() == before
    driver.segment([10])
    assert driver.cache.n == 100


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    driver = ready(parse(SMALL), capacity=64)
    driver.segment([60])
    cache, before = driver.cache, driver.cache.state()
    with pytest.raises(ValueError, match="65 entries do not fit a capacity of 64"):
        cache.prepare(5)
    with pytest.raises(ValueError, match="60 entries do not fit a capacity of 59"):
        cache.copy_to(driver.memory(59))
    driver.step(*(np.zeros((4, 1, heads, 4)) for heads in (4, 2, 2)))
    keys = cache.buffers.keys.clone()
    with pytest.raises(ValueError, match="29 entries do not fit a capacity of 28"):
        cache.end_segment(driver.memory(28))
    assert cache.buffers is driver.workspace
    assert (cache.n, cache.sampled, cache.evicted) == (64, 0, before.evicted)
    torch.testing.assert_close(cache.buffers.keys, keys, rtol=0, atol=0)
    assert cache.end_segment(driver.memory(29)) == 35


def test_states_are_required_where_the_policy_reads_them() -> None:
    rotary = Rotary.of(4, 100)
    plain = Buffers.empty(1, 2, 64, 4, torch.float32, "cpu")
    with pytest.raises(ValueError, match="needs the state 'score'"):
        Cache(parse(SMALL), rotary, plain)
    driver = ready(parse(SMALL))
    driver.segment([5])
    with pytest.raises(ValueError, match="needs the state 'score'"):
        driver.cache.copy_to(plain)
    cache = Cache(Streaming(sink=1, window=4, block=1), rotary, plain)
    cache.begin_segment(9)
    cache.prepare(9)
    cache.append(9)
    assert cache.end_segment() == 4
    assert plain.position[0, 1, :5].tolist() == [0, 5, 6, 7, 8]


def test_moving_keeps_the_entries_and_leaves_the_old_memory() -> None:
    driver = ready(parse(SMALL))
    driver.segment([30])
    keys = driver.workspace.keys[:, :, :30].clone()
    slot = driver.memory(40)
    driver.cache.copy_to(slot)
    assert driver.cache.buffers is slot
    driver.workspace.keys.zero_()
    torch.testing.assert_close(slot.keys[:, :, :30], keys, rtol=0, atol=0)
    again = driver.memory(40)
    driver.cache.buffers = slot
    assert driver.cache.end_segment(again) == 0  # nothing due: it moves all the same
    torch.testing.assert_close(again.keys[:, :, :30], keys, rtol=0, atol=0)
    assert driver.cache.buffers is again


@pytest.mark.parametrize("mode", ["in_cache", "original"])
def test_a_restored_checkpoint_continues_as_if_nothing_had_happened(mode: str) -> None:
    policy = parse(SMALL.replace(")", f",positions={mode})"))
    straight, tried = ready(policy, 128, 150), ready(policy, 128, 150)
    for driver in (straight, tried):
        driver.segment([55])
    state, reserve = tried.cache.state(), tried.memory(64)
    reserve.copy_from(tried.cache.buffers, tried.cache.n)
    random = tried.random.bit_generator.state
    for cuts in ([30], [70], [1], [1]):
        tried.segment(cuts)
    assert tried.cache.state() != state
    tried.cache.restore(state)
    tried.cache.buffers.copy_from(reserve, state.n)
    tried.random.bit_generator.state = random
    for cuts in ([20], [1], [60], [1]):
        assert straight.segment(cuts) == tried.segment(cuts)
    assert_equal(straight.cache, tried.cache)


@dataclass(frozen=True, kw_only=True)
class Halving(Policy):
    """Down to 4 entries, halving: every second goes, or is merged into the one before, in turn."""

    merges_first: bool = True

    name: ClassVar[str] = "halving"

    @property
    def bound(self) -> int:
        return 4

    def due(self, n: int, sampled: int) -> bool:
        return n > 4

    def compact(self, view: View) -> Compaction:
        merges = (view.sampled % 2 == 0) == self.merges_first
        merge = torch.arange(view.n).expand(view.position.shape) // 2
        return Compaction(view.span(0, view.n, 2), view.sampled + 1, merge=merge if merges else None)


@pytest.mark.parametrize(
    ("merges_first", "joined"),
    [
        # of 16 tokens 0, 2, 4 ... survive first, then 0, 4, 8, 12
        (True, [[0, 1], [4, 5], [8, 9], [12, 13]]),
        (False, [[0, 2], [4, 6], [8, 10], [12, 14]]),
    ],
)
@pytest.mark.parametrize("mode", ["in_cache", "original"])
def test_merges_compose_over_the_rounds_of_a_compaction(
    merges_first: bool, joined: list[list[int]], mode: Literal["in_cache", "original"]
) -> None:
    driver = ready(Halving(merges_first=merges_first, positions=mode))
    driver.cache.begin_segment(16)
    driver.step(*driver.draw(16))
    values = driver.workspace.values[:, :, :16].clone()
    assert driver.cache.end_segment() == 12
    means = torch.stack([values[:, :, tokens].mean(dim=2) for tokens in joined], dim=2)
    torch.testing.assert_close(driver.workspace.values[:, :, :4], means)
    oracle = driver.oracle()
    for place, tokens in enumerate(joined):
        key = np.mean([driver.keys[token][0, 0] for token in tokens], axis=0)
        turned = oracle.rotate(key, place if mode == "in_cache" else tokens[0])
        np.testing.assert_allclose(driver.workspace.keys[0, 0, place], turned, atol=1e-12)
    assert driver.positions().tolist() == [[[0, 4, 8, 12]] * 2]


def test_one_state_restarts_with_each_segment_and_the_other_goes_on() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Two(Halving):
        @property
        def states(self) -> tuple[State, ...]:
            return (State("last", per="segment"), State("ever"))

    driver = ready(Two())
    for count in (2, 1, 1):
        driver.segment([count])
    last, ever = (driver.cache.buffers.state[name][0, 0, :4] for name in ("last", "ever"))
    assert float(last.sum()) == pytest.approx(2)  # the last token's, from the two query heads of a KV head
    assert float(ever.sum()) == pytest.approx(8)


@pytest.mark.parametrize("shape", [(1, 2, 0), (3,), (2, 3)])
def test_survivors_of_the_wrong_shape_are_an_error_and_change_nothing(shape: tuple[int, ...]) -> None:
    class Wrong(Halving):
        def compact(self, view: View) -> Compaction:
            return Compaction(torch.arange(shape[-1]).expand(shape))

    driver = ready(Wrong())
    driver.segment([4])
    with pytest.raises(RuntimeError, match=r"survivors have the shape .* and not \[1, 2, m\]"):
        driver.segment([1])
    assert (driver.cache.n, driver.cache.evicted) == (5, 0)


def test_compaction_reports_what_it_evicts_and_due_foretells_it() -> None:
    driver = ready(parse(SMALL), capacity=128)
    assert driver.segment([60]) == 0
    assert not driver.cache.due
    driver.cache.begin_segment(1)
    driver.step(*(np.zeros((1, 1, heads, 4)) for heads in (4, 2, 2)))
    assert driver.cache.due
    assert driver.cache.end_segment() == 61 - 20 - 9  # 41 middle entries in 9 cells
    assert (driver.cache.n, driver.cache.sampled, driver.cache.evicted) == (29, 9, 32)
