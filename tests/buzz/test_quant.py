"""Entries in few bits: what is lost once, and that nothing is lost again."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from buzz import Buffers, Cache, Policy, PolicyError, Rotary, attend_chunk, parse
from buzz.moving import Move
from buzz.quant import BLOCK, GROUP, Packed, pack, unpack
from tests.buzz.driver import Driver, Shape, segments

H2O = "h2o(heavy=50,recent=60,block=10,kivi=4,residual=20)"
SPECS = [
    H2O,
    "h2o(heavy=50,recent=60,block=10,kivi=2,residual=0,positions=original)",
    "buzz(sink=4,window=16,threshold=80,kivi=4,residual=40)",  # evicts what is not quantised yet
    "streaming(sink=4,window=90,block=7,kivi=2,residual=16,positions=original)",
    "elastic(sink=3,heavy=90,recent=2,distance=6,block=5,kivi=4,residual=30)",
    "cascade(sink=3,cascades=4,size=25,block=4,kivi=4,residual=10)",
    "full(bound=900,kivi=4,residual=20)",
]
SHAPE = Shape(layers=2, head_dim=GROUP * 2, max_positions=1000, capacity=1000, dtype=torch.float32)


class Session(Driver):
    """A driver whose slot has packed memory; prompts that do not fit it go through the workspace."""

    def __init__(self, policy: Policy, shape: Shape = SHAPE, seed: int = 0) -> None:
        super().__init__(policy, shape, seed, slot=True)

    def memory(self, capacity: int, packed: int | None = None) -> Buffers:
        shape, policy = self.shape, self.policy
        slot = capacity < shape.capacity
        dense = policy.residual + BLOCK if slot else capacity
        size = (shape.layers, shape.kv_heads, capacity, shape.head_dim, shape.dtype, "cpu", policy.states)
        memory = Buffers.empty(*size, policy.kivi, policy.bound if slot else 0, dense)
        for tensor in (memory.keys, memory.values, memory.packed.key_grid, memory.packed.value_grid):
            tensor.fill_(torch.nan)
        memory.packed.channels.fill_(torch.nan)
        return memory

    def segment(self, cuts: Sequence[int], oracle: object = None) -> int:
        cache = self.cache
        if cache.buffers is self.slot and sum(cuts) > cache.room:
            cache.copy_to(self.workspace)
        cache.begin_segment(sum(cuts))
        for count in cuts:
            self.step(*self.draw(count))
        return cache.end_segment(self.slot if cache.buffers is not self.slot else None)

    def step(self, query: np.ndarray, key: np.ndarray, value: np.ndarray) -> None:
        cache, count = self.cache, len(query)
        positions, end = torch.tensor(cache.next_positions(count)), cache.n + count
        cache.prepare(count)
        q, k, v = (torch.from_numpy(t).to(self.shape.dtype).permute(1, 2, 0, 3) for t in (query, key, value))
        q, k = self.rotary.rotate(q, positions), self.rotary.rotate(k, positions)
        self.output = torch.stack(
            [
                attend_chunk(
                    q[layer],
                    *cache.live.extend(layer, cache.n, k[layer], v[layer]),
                    self.shape.head_dim**-0.5,
                    cache.records(layer, end),
                    cache.seen,
                    self.policy.log_n,
                )
                for layer in range(self.shape.layers)
            ]
        )
        cache.append(count)

    def packed(self) -> dict[tuple[int, int, int], tuple[bytes, ...]]:
        """What is stored of each quantised token, by layer, head and position."""
        cache, packed = self.cache, self.cache.buffers.packed
        found = {}
        for layer, head, i in np.ndindex(*packed.key_codes.shape[:2], cache.packed):
            at = layer, head, i
            position = int(cache.buffers.position[at])
            stored = packed.key_codes, packed.value_codes, packed.key_grid, packed.value_grid
            found[layer, head, position] = tuple(t[at].numpy().tobytes() for t in stored)
        return found


def entries(count: int = 300, seed: int = 0) -> Tensor:
    scale = torch.rand(2 * GROUP, generator=torch.Generator().manual_seed(seed + 1)) * 4
    noise = torch.randn(2, count, 2 * GROUP, generator=torch.Generator().manual_seed(seed))
    return noise * scale + 1


@pytest.mark.parametrize("bits", [2, 4])
def test_an_entry_is_off_by_half_a_step_at_most(bits: int) -> None:
    given = entries()
    codes, grid = pack(given, bits)
    assert (codes.dtype, codes.shape) == (torch.uint8, (2, 300, 2 * GROUP * bits // 8))
    assert (grid.dtype, grid.shape) == (torch.float16, (2, 300, 2, 2))
    groups = given.unflatten(-1, (2, GROUP))
    span = groups.amax(-1) - groups.amin(-1)
    off = (unpack(codes, grid, torch.float32).unflatten(-1, (2, GROUP)) - groups).abs().amax(-1)
    assert (off <= span / (2**bits - 1) * 0.5 + 0.01).all()
    assert off.max() > span.max() / 2**bits / 4


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_quantising_again_changes_nothing(bits: int, wide: torch.dtype) -> None:
    codes, grid = pack(entries(), bits)
    read = unpack(codes, grid, wide)
    assert read.dtype == wide
    for again in (read, read * (1 + 3e-7)):  # what two rotations may do in float32
        twice, its_grid = pack(again, bits)
        assert torch.equal(twice, codes)
        assert torch.equal(its_grid, grid)


@pytest.mark.parametrize("constant", [0.0, -3.0])
def test_what_has_no_range_is_exact(constant: float) -> None:
    given = torch.full((1, GROUP), constant)
    assert torch.equal(unpack(*pack(given, 4), torch.float32), given)


def test_what_float16_cannot_say_stays_finite() -> None:
    for largest in (1e5, -1e9, 1e30):
        given = torch.linspace(0, largest, GROUP)
        assert unpack(*pack(given, 4), torch.float32).isfinite().all()


def test_each_code_has_bits_of_its_own() -> None:
    levels = torch.arange(16.0).repeat(4)
    codes, grid = pack(levels, 4)
    assert sorted({*(codes & 15).tolist(), *(codes >> 4).tolist()}) == list(range(16))
    assert torch.equal(unpack(codes, grid, torch.float32), levels)


def test_a_large_key_channel_does_not_coarsen_the_others() -> None:
    memory = Packed.empty(1, 2, 300, 2 * GROUP, 4, "cpu")
    keys = entries()
    keys[..., 5] = keys[..., 5] * 50 + 400
    memory.measure(0, keys[:, :64])
    memory.write(0, 0, keys, keys)
    rotary = Rotary.of(2 * GROUP, 100)
    nowhere = torch.zeros(1, 2, 300, dtype=torch.int64)
    read, plain = memory.using(300, 300, rotary, in_cache=False).read(0, nowhere, torch.float32)
    others = [i for i in range(GROUP) if i != 5]
    off, coarse = ((t - keys)[..., others].abs().mean() for t in (read, plain))
    assert off < coarse / 10


@pytest.mark.parametrize("spec", SPECS)
def test_at_rest_all_but_the_residual_is_quantised_by_counts_alone(spec: str) -> None:
    session = Session(parse(spec).resolve(1000))
    policy, cache = session.policy, session.cache
    for cuts in segments(seed=1, steps=250, longest=60):
        n, packed = cache.n, cache.packed
        if not policy.evicts and n + sum(cuts) > policy.bound:
            break
        evicted = session.segment(cuts)
        assert cache.n <= policy.bound
        assert cache.n - cache.packed < policy.residual + BLOCK
        assert cache.packed == 0 or cache.n - cache.packed >= policy.residual or sum(cuts) > 1
        assert cache.packed >= packed - evicted or sum(cuts) > 1
        assert session.output.isfinite().all()
    assert cache.packed > 0
    assert cache.evicted > 100 or not policy.evicts


@pytest.mark.parametrize("spec", SPECS)
def test_what_was_quantised_keeps_its_codes_for_ever(spec: str) -> None:
    """Through compactions, workspaces and the change of positions, unless it was merged into."""
    session, known = Session(parse(spec).resolve(1000)), {}
    held = compared = 0
    for cuts in segments(seed=2, steps=500, longest=120):
        if not session.policy.evicts and session.cache.n + sum(cuts) > session.policy.bound:
            break
        session.segment(cuts)
        if session.policy.name == "elastic" and sum(cuts) > 1:
            known = {}
        now = session.packed()
        for token in now.keys() & known.keys():
            compared += 1
            held += now[token] == known[token]
        known |= now
    assert compared > 10_000
    print(held, compared)
    assert held == compared
    assert session.cache.rotated_in_cache == (session.policy.evicts or "original" not in spec)


@pytest.mark.parametrize("spec", SPECS)
def test_moving_codes_is_reading_and_quantising_again(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    quick, slow = (Session(parse(spec).resolve(1000)) for _ in range(2))
    codes = Move._codes
    moved = 0
    for cuts in segments(seed=4, steps=60, longest=60):
        if not quick.policy.evicts and quick.cache.n + sum(cuts) > quick.policy.bound:
            break
        moved += quick.cache.packed > 0
        quick.segment(cuts)
        monkeypatch.setattr(Move, "_codes", lambda _: 0)
        slow.segment(cuts)
        monkeypatch.setattr(Move, "_codes", codes)
        assert quick.cache.packed == slow.cache.packed
        n, live, twin = quick.cache.n, quick.cache.live, slow.cache.live
        assert torch.equal(live.position[..., :n], twin.position[..., :n])
        for layer in range(len(live.keys)):
            for mine, theirs in zip(live.read(layer, n), twin.read(layer, n), strict=True):
                assert torch.equal(mine, theirs)
    assert moved > 5


@pytest.mark.parametrize("spec", [spec for spec in SPECS if "elastic" not in spec])
def test_what_is_read_is_what_was_given(spec: str) -> None:
    session = Session(parse(spec).resolve(1000))
    values: list[np.ndarray] = []
    draw = session.draw

    def remember(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        query, key, value = draw(count)
        values.extend(value)
        return query, key, value

    session.draw = remember  # type: ignore[method-assign]
    for cuts in segments(seed=3, steps=250, longest=60):
        session.segment(cuts)
    while not session.cache.packed:  # a compaction may have left little
        session.segment([1])
    cache, bits = session.cache, session.policy.kivi or 0
    step = 5 / (2**bits - 1)  # the range of 32 normal numbers is about 4.1
    read = [cache.live.read(layer, cache.n) for layer in range(2)]
    kept = session.positions()
    fresh = np.zeros((*kept.shape, SHAPE.head_dim))
    for layer, head, i in np.ndindex(*kept.shape):
        fresh[layer, head, i] = values[kept[layer, head, i]][layer, head]
    for expected, got in ((session.fresh_keys(), 0), (fresh, 1)):
        off = np.abs(torch.stack([pair[got] for pair in read]).numpy() - expected)
        assert off[:, :, cache.packed :].max() < 1e-4
        assert 0.05 * step < off[:, :, : cache.packed].mean() < 0.5 * step


@pytest.mark.parametrize("spec", SPECS)
def test_the_outcome_does_not_depend_on_the_cuts(spec: str) -> None:
    policy = parse(spec).resolve(1000)
    cut, whole = Session(policy, seed=4), Session(policy, seed=4)
    for cuts in segments(seed=5, steps=160, longest=100):
        if not policy.evicts and cut.cache.n + sum(cuts) > policy.bound:
            break
        cut.segment(cuts)
        whole.segment([sum(cuts)])
        assert cut.cache.state() == whole.cache.state()
    assert np.array_equal(cut.positions(), whole.positions())
    for layer in range(2):
        pairs = zip(*(s.cache.live.read(layer, s.cache.n) for s in (cut, whole)), strict=True)
        for mine, theirs in pairs:
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)


@settings(max_examples=12, deadline=None)
@given(prompts=st.lists(st.integers(1, 60), min_size=2, max_size=5), original=st.booleans())
def test_a_batch_reads_what_each_session_reads_alone(prompts: list[int], original: bool) -> None:
    """Whatever the memory beyond each session's entries holds."""
    policy = parse(H2O.replace(")", f",positions={'original' if original else 'in_cache'})"))
    sessions = [Session(policy, seed=i) for i in range(len(prompts))]
    for session, prompt in zip(sessions, prompts, strict=True):
        for cuts in itertools.repeat([1], prompt * 2):
            session.segment(cuts)
    slots, caches = [s.slot for s in sessions], [s.cache for s in sessions]
    for session in sessions:
        session.segment([1])  # into the slot, if it was not there
    counts = [cache.packed for cache in caches]

    def together(tensors: list[Tensor]) -> Tensor:
        return torch.stack(tensors)

    packed = Packed(*(together(list(each)) for each in zip(*(s.packed.tensors for s in slots), strict=True)))
    memory = Buffers(
        *(together([getattr(s, name) for s in slots]) for name in ("keys", "values", "position")),
        packed=packed.using(torch.tensor(counts), max(counts), sessions[0].rotary, not original),
    )
    starts, new = torch.tensor([cache.n for cache in caches]), torch.randn(2, len(prompts), 2, SHAPE.head_dim)
    most = int(starts.max()) + 1
    keys, values = memory.extend_each(1, starts, most, *new)
    assert keys.shape == values.shape == (len(prompts), 2, most, SHAPE.head_dim)
    for i, cache in enumerate(caches):
        alone = cache.live.extend(1, cache.n, new[0, i, :, None], new[1, i, :, None])
        for mine, theirs in zip((keys, values), alone, strict=True):
            torch.testing.assert_close(mine[i, :, : cache.n + 1], theirs, rtol=0, atol=1e-6)


def test_a_workspace_and_back_is_the_same_bit_for_bit() -> None:
    session = Session(parse(H2O))
    session.segment([100])
    for _ in range(30):
        session.segment([1])
    cache = session.cache
    before, counts = session.packed(), cache.state()
    cache.copy_to(session.workspace)
    assert (cache.packed, cache.measured, cache.n) == (0, True, counts.n)
    assert not cache.end_segment(session.slot)
    assert cache.packed == cache.n - session.policy.residual
    after = session.packed()
    assert before.keys() <= after.keys()
    assert all(after[token] == stored for token, stored in before.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_residual_may_have_any_precision(dtype: torch.dtype) -> None:
    exact = Session(parse(H2O))
    session = Session(parse(H2O), dataclasses.replace(SHAPE, dtype=dtype))
    for cuts in ([80], [5], [1], [1]):
        exact.segment(cuts)
        session.segment(cuts)
    assert session.cache.packed == exact.cache.packed > 0
    assert session.output.dtype == dtype
    torch.testing.assert_close(session.output.float(), exact.output, rtol=0, atol=0.1)


def test_room_counts_what_can_be_quantised_ahead() -> None:
    session = Session(parse("h2o(heavy=50,recent=60,block=10,kivi=4,residual=40)"))
    cache = session.cache
    session.segment([45])
    assert (cache.packed, cache.buffers.dense, cache.buffers.capacity) == (0, 40 + BLOCK, 118)
    assert cache.room == 40 + BLOCK - 45, "the key channels are not measured on so few"
    assert not cache.makes_room(30)
    session.segment([27])
    assert (cache.packed, cache.room) == (72 - 40, 118 - 72)
    assert not cache.makes_room(BLOCK)
    assert cache.makes_room(BLOCK + 1)
    assert not cache.makes_room(40 + BLOCK + 1), "that does not fit at all"
    cache.begin_segment(46)
    assert cache.packed == 118 - 72
    cache.prepare(46)
    with pytest.raises(ValueError, match="119 entries do not fit a capacity of 118"):
        cache.prepare(47)


def test_settles_foretells_what_a_segment_s_end_changes() -> None:
    session = Session(parse(H2O))
    changed = foretold = 0
    for _ in range(400):
        cache = session.cache
        before, expected = (cache.packed, cache.evicted), cache.settles(1)
        session.segment([1])
        assert ((cache.packed, cache.evicted) != before) == expected
        changed += expected
        foretold += 1
    assert 20 < changed < foretold / 2


def test_memory_must_be_of_the_policy_s_bits() -> None:
    rotary, size = Rotary.of(32, 100), (1, 2, 40, 32, torch.float32, "cpu")
    policy = parse("streaming(sink=1,window=37,block=1,kivi=2,residual=4)")
    for memory in (Buffers.empty(*size), Buffers.empty(*size, bits=4, packed=20)):
        with pytest.raises(ValueError, match="needs memory for entries of 2 bits"):
            Cache(policy, rotary, memory)
    cache = Cache(policy, rotary, Buffers.empty(*size, bits=2))
    cache.begin_segment(38)
    cache.prepare(38)
    cache.append(38)
    with pytest.raises(ValueError, match="34 packed entries and 4 others do not fit 0 and 40"):
        cache.end_segment()
    assert (cache.n, cache.packed) == (38, 0)


@pytest.mark.parametrize(
    ("bits", "head_dim", "packed", "reason"),
    [
        (3, 32, 8, "3 bits and a head_dim of 32"),
        (4, 48, 8, "4 bits and a head_dim of 48"),
        (None, 32, 8, "memory for 8 quantised entries needs to know their bits"),
    ],
)
def test_memory_that_makes_no_sense_is_refused(
    bits: int | None, head_dim: int, packed: int, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        Buffers.empty(1, 1, 16, head_dim, torch.float32, "cpu", (), bits, packed)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("buzz(kivi=3)", "kivi=3 is not 2 or 4 bits, or none"),
        ("buzz(kivi=true)", "kivi must be an integer or none"),
        ("buzz(residual=64)", "residual=64 means nothing without kivi"),
        ("buzz(kivi=4,residual=-1)", "residual=-1 is not between"),
    ],
)
def test_settings_that_make_no_sense_are_refused(spec: str, reason: str) -> None:
    with pytest.raises(PolicyError, match=reason):
        parse(spec)


def test_settings_are_written_where_they_differ() -> None:
    assert "kivi" not in str(parse("h2o"))
    assert str(parse("full(bound=900,kivi=4)")) == "full(bound=900,kivi=4)"
    assert str(parse("full(kivi=2,residual=0,bound=90)")) == "full(bound=90,kivi=2,residual=0)"
