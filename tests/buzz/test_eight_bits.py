"""Caches in eight bits, against the same in floats over entries that rounding does not change."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from buzz import Buffers, Cache, Rotary, attend_chunk, parse
from buzz.eight_bits import rounded, widened

LAYERS, HEADS, DIM, CAPACITY = 2, 2, 32, 104


@given(st.integers(0, 2**32 - 1), st.floats(1e-6, 1e6))
def test_an_entry_is_off_by_half_a_step_at_most(seed: int, size: float) -> None:
    entries = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(seed)) * size
    codes, scales = rounded(entries)
    found = widened(codes, scales, torch.float32)
    half = entries.abs().amax(dim=-1, keepdim=True) / 254
    assert bool(((found - entries).abs() <= half * 1.0001).all())
    again, same = rounded(found)
    assert torch.equal(again, codes)
    assert torch.allclose(same, scales, rtol=1e-6)


def test_zeros_and_what_is_not_finite() -> None:
    entries = torch.tensor([[0.0, 0.0], [1.0, math.nan], [math.inf, 1.0], [-math.inf, math.inf], [1.0, -2.0]])
    codes, scales = rounded(entries)
    found = widened(codes, scales, torch.float32)
    assert found[0].tolist() == [0, 0]
    assert bool(found[1:4].isnan().all())
    assert torch.allclose(found[4], entries[4], atol=0.01)


def memory(policy: str, dtype: torch.dtype) -> Buffers:
    chosen = parse(policy)
    packed = 0 if chosen.kivi is None else CAPACITY
    sizes = (LAYERS, HEADS, CAPACITY + packed, DIM)
    return Buffers.empty(*sizes, dtype, "cpu", chosen.states, chosen.kivi, packed, CAPACITY)


def outputs(policy: str, dtype: torch.dtype, tokens: int) -> tuple[list[Tensor], Cache]:
    """Of a prompt and single tokens, through compactions, and once to other memory and back."""
    generator = torch.Generator().manual_seed(0)
    cache = Cache(parse(policy), Rotary.of(DIM, 4096), memory(policy, dtype))
    found = []
    for at, count in enumerate([20] + [1] * tokens):
        cache.begin_segment(count)
        cache.prepare(count)
        for layer in range(LAYERS):
            new = torch.randn(2, HEADS, count, DIM, generator=generator)
            keys, values = (widened(*rounded(each), torch.float32) for each in new)
            query = 2 * torch.randn(2 * HEADS, count, DIM, generator=generator)
            records = cache.records(layer, cache.n + count)
            entries = cache.extend(layer, keys, values)
            found.append(attend_chunk(query, *entries, 0.2, records, cache.seen, None))
        cache.append(count)
        cache.end_segment()
        if at == tokens // 2:
            cache.copy_to(memory(policy, dtype))
    return found, cache


@pytest.mark.parametrize(
    ("policy", "near"),
    [
        ("full(bound=104,positions=original)", 1e-6),
        ("buzz2(sink=2,window=8,hot=24,cells=10,block=8,positions=original)", 1e-6),
        ("buzz2(sink=2,window=8,hot=24,cells=10,block=8,positions=original,values=true)", 1e-6),
        ("buzz(sink=2,window=8,threshold=40,positions=original)", 1e-6),
        # keys that move are rounded again, and the others of few bits are rounded more coarsely
        ("streaming(sink=2,window=40,block=8)", 0.1),
        ("h2o(heavy=20,recent=20,block=8)", 0.1),
        ("buzz2(sink=2,window=8,hot=40,cells=30,block=8,positions=original,kivi=4,residual=32)", 0.1),
    ],
)
def test_a_cache_of_such_entries_is_that_of_floats(policy: str, near: float) -> None:
    eight, cache = outputs(policy, torch.int8, 80)
    floats, same = outputs(policy, torch.float32, 80)
    assert cache.state() == same.state()
    assert cache.packed == 0 or "kivi" in policy
    for found, expected in zip(eight, floats, strict=True):
        assert torch.allclose(found, expected, atol=near)


def test_its_memory_is_a_quarter_and_the_scales() -> None:
    eight, floats = (memory("full(bound=104)", dtype) for dtype in (torch.int8, torch.float32))
    entries = 2 * LAYERS * HEADS * CAPACITY
    assert floats.nbytes - eight.nbytes == entries * (4 * DIM - DIM - 4)
    both = Buffers.empty(2 * LAYERS, HEADS, CAPACITY, DIM, torch.int8, "cpu").split(LAYERS)
    one = both.of_sessions(1)
    one.write((slice(None), slice(None), slice(0, 3)), *torch.ones(2, LAYERS, HEADS, 3, DIM))
    keys, values = both.of_sessions(1).read(slice(None), 3)
    assert torch.allclose(keys, torch.ones(1), rtol=1e-6)
    assert torch.allclose(values, torch.ones(1), rtol=1e-6)
    assert not both.of_sessions(0).read(slice(None), 3)[0].any()
