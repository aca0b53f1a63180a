"""The compiled kernel against the same in torch operations."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from apiary_server.model.attention import DecodeRun, decode
from apiary_server.model.backends.cpu.attention import Attention
from buzz import Buffers, State

LAYERS, CAPACITY = 2, 70
LENGTHS = [1, 2, 17, CAPACITY - 1]  # before the new entry
MASS, FADING, VOTES = State("mass"), State("fading", decay=0.9), State("votes", kind="vote")
# query heads, KV heads, channels: some compiled for, some not
SHAPES = [
    (9, 3, 64),
    (4, 4, 128),
    (14, 2, 64),
    (12, 2, 64),
    (32, 8, 128),
    (2, 2, 64),
    (4, 2, 128),
    (10, 2, 40),
]
SHAPES += [(3, 1, 256), (1, 1, 8), (5, 1, 72)]


def memory(kv_heads: int, dim: int, dtype: torch.dtype, states: tuple[State, ...]) -> Buffers:
    """Random entries, and garbage behind them."""
    shape = (len(LENGTHS), LAYERS, kv_heads, CAPACITY)
    keys, values = torch.randn(2, *shape, dim)
    for row, length in enumerate(LENGTHS):
        keys[row, :, :, length:] = math.nan
        values[row, :, :, length:] = math.inf
    named = {state.name: torch.randint(50, shape).to(state.dtype) for state in states}
    return Buffers(keys.to(dtype), values.to(dtype), torch.zeros(shape, dtype=torch.int32), named)


def copy(buffers: Buffers) -> Buffers:
    state = {name: tensor.clone() for name, tensor in buffers.state.items()}
    return replace(buffers, keys=buffers.keys.clone(), values=buffers.values.clone(), state=state)


def run_of(cache: Buffers, states: tuple[State, ...], log_n: int | None) -> DecodeRun:
    seen = torch.tensor([100 * length for length in LENGTHS])
    return DecodeRun(slice(0, 4), cache, torch.tensor(LENGTHS), seen, CAPACITY, states, log_n)


def heads_of(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as the decoder has them: parts of wider rows."""
    query_heads, kv_heads, dim = shape
    rows = torch.randn(len(LENGTHS), query_heads + kv_heads, dim)
    queries, keys = rows.split((query_heads, kv_heads), dim=1)
    return queries, keys, torch.randn(len(LENGTHS), 3 + kv_heads, dim)[:, 3:]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("states", "log_n"), [((), None), ((MASS,), None), ((FADING, VOTES), 8), ((VOTES, MASS), None)]
)
def test_it_does_what_torch_operations_do(
    shape: tuple[int, int, int], dtype: torch.dtype, states: tuple[State, ...], log_n: int | None
) -> None:
    torch.manual_seed(0)
    queries, keys, values = heads_of(shape)
    before = memory(*shape[1:], dtype, states)
    ours, theirs = copy(before), copy(before)
    layer, scale = 1, shape[2] ** -0.5
    found = Attention()(layer, queries, keys, values, scale, run_of(ours, states, log_n))
    expected = decode(layer, queries, keys, values, scale, run_of(theirs, states, log_n))
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    for name in ("keys", "values"):
        assert torch.equal(getattr(ours, name).nan_to_num(7), getattr(theirs, name).nan_to_num(7))
    for row, length in enumerate(LENGTHS):
        for name, state in ours.state.items():
            live, twin = (t[row, layer, :, : length + 1] for t in (state, theirs.state[name]))
            assert torch.allclose(live, twin, rtol=1e-5, atol=1e-5)
            beyond = state[row, layer, :, length + 1 :]
            assert torch.equal(beyond, before.state[name][row, layer, :, length + 1 :])
            assert torch.equal(state[:, 0], before.state[name][:, 0]), "another layer was touched"


def test_a_row_does_not_depend_on_the_others() -> None:
    torch.manual_seed(0)
    queries, keys, values = heads_of((9, 3, 64))
    cache = memory(3, 64, torch.float32, (MASS,))
    together = copy(cache)
    found = Attention()(0, queries, keys, values, 0.1, run_of(together, (MASS,), None))
    for row, length in enumerate(LENGTHS):
        alone = copy(cache)
        own = Buffers(
            alone.keys[row : row + 1],
            alone.values[row : row + 1],
            alone.position[row : row + 1],
            {name: state[row : row + 1] for name, state in alone.state.items()},
        )
        count = torch.tensor([length])
        run = DecodeRun(slice(0, 1), own, count, count, length + 1, (MASS,), None)
        one = Attention()(0, *(part[row : row + 1] for part in (queries, keys, values)), 0.1, run)
        assert torch.equal(one[0], found[row])
        assert torch.equal(alone.state["mass"][row], together.state["mass"][row])


def test_large_logits_do_not_overflow() -> None:
    torch.manual_seed(0)
    queries, keys, values = heads_of((9, 3, 64))
    cache = memory(3, 64, torch.float32, ())
    found = Attention()(0, queries * 1e4, keys, values, 10.0, run_of(copy(cache), (), None))
    expected = decode(0, queries * 1e4, keys, values, 10.0, run_of(copy(cache), (), None))
    assert found.isfinite().all()
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_other_types_are_left_to_torch_operations() -> None:
    torch.manual_seed(0)
    queries, keys, values = (part.double() for part in heads_of((9, 3, 64)))
    cache = memory(3, 64, torch.float64, (MASS,))
    twin = copy(cache)
    found = Attention()(1, queries, keys, values, 0.1, run_of(cache, (MASS,), None))
    assert torch.equal(found, decode(1, queries, keys, values, 0.1, run_of(twin, (MASS,), None)))
    assert found.dtype == torch.float64
