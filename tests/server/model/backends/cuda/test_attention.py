"""Attention over slots by index against the same over neighbouring slots."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from apiary_server.model.attention import DecodeRun, decode
from apiary_server.model.backends.cuda import attention
from apiary_server.model.backends.cuda.attention import ByIndex
from buzz import Buffers, State

SLOTS, LAYERS, KV_HEADS, HEADS, DIM, CAPACITY = 6, 2, 2, 6, 8, 40
MASS, FADING, VOTES = State("mass"), State("fading", decay=0.9), State("votes", kind="vote")
LENGTHS = [0, 3, 17, CAPACITY - 1, 8, 20]  # of each slot, before the new entry


def memory(dtype: torch.dtype, states: tuple[State, ...]) -> Buffers:
    """Random entries, and garbage behind them."""
    shape = (SLOTS, LAYERS, KV_HEADS, CAPACITY)
    keys, values = torch.randn(2, *shape, DIM)
    for slot, length in enumerate(LENGTHS):
        keys[slot, :, :, length:] = math.nan
        values[slot, :, :, length:] = math.inf
    named = {state.name: torch.randint(50, shape).to(state.dtype) for state in states}
    return Buffers(keys.to(dtype), values.to(dtype), torch.zeros(shape, dtype=torch.int32), named)


def copied(cache: Buffers) -> Buffers:
    state = {name: tensor.clone() for name, tensor in cache.state.items()}
    return replace(cache, keys=cache.keys.clone(), values=cache.values.clone(), state=state)


def one(cache: Buffers, slot: int) -> Buffers:
    """A slot with a leading dimension of one."""
    own = slice(slot, slot + 1)
    state = {name: tensor[own] for name, tensor in cache.state.items()}
    return Buffers(cache.keys[own], cache.values[own], cache.position[own], state)


def run_of(
    cache: Buffers, slots: list[int], most: int, states: tuple[State, ...], log_n: int | None
) -> DecodeRun:
    entries = torch.tensor([LENGTHS[slot] for slot in slots])
    return DecodeRun(slice(0, len(slots)), cache, entries, 10 * entries, most, states, log_n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slots", [[0, 1, 2, 3, 4, 5], [4, 0, 2], [3], [5, 1, 5, 5]], ids=str)
@pytest.mark.parametrize(
    ("states", "log_n"), [((), None), ((MASS,), None), ((FADING, VOTES), 8), ((VOTES, MASS), None)]
)
@pytest.mark.parametrize("gathered", [1, 2 * KV_HEADS * DIM * CAPACITY, 2**25])
def test_rows_get_what_their_slots_give_alone(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    slots: list[int],
    states: tuple[State, ...],
    log_n: int | None,
    gathered: int,
) -> None:
    """Some slots come several times, with equal rows: that is how steps are filled up."""
    monkeypatch.setattr(attention, "_GATHERED", gathered)
    torch.manual_seed(0)
    cache = memory(dtype, states)
    ours, theirs = copied(cache), copied(cache)
    new = torch.randn(SLOTS, HEADS + 2 * KV_HEADS, DIM)[slots]  # parts of wider rows, as in a decoder
    queries, keys, values = new.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
    run = run_of(ours, slots, CAPACITY, states, log_n)
    by_index = ByIndex(torch.tensor(slots), run.entries, CAPACITY)
    found = by_index.decode(1, queries, keys, values, 0.3, run)
    assert found.dtype == torch.float32
    expected: dict[int, Tensor] = {}
    for row, slot in enumerate(slots):
        if slot not in expected:
            alone = run_of(one(theirs, slot), [slot], LENGTHS[slot] + 1, states, log_n)
            own = (part[row : row + 1] for part in (queries, keys, values))
            expected[slot] = decode(1, *own, 0.3, alone)[0]
        torch.testing.assert_close(found[row], expected[slot], rtol=1e-4, atol=1e-5)
    for name in ("keys", "values"):
        assert torch.equal(plain(getattr(ours, name)), plain(getattr(theirs, name)))
    for name, state in ours.state.items():
        for slot, length in enumerate(LENGTHS):
            live = slice(0, length + (slot in slots))
            torch.testing.assert_close(
                state[slot, :, :, live], theirs.state[name][slot, :, :, live], rtol=1e-5, atol=1e-5
            )
        others = [slot for slot in range(SLOTS) if slot not in slots]
        assert torch.equal(state[others], cache.state[name][others])
        assert torch.equal(state[:, 0], cache.state[name][:, 0]), "another layer was touched"


def plain(tensor: Tensor) -> Tensor:
    return tensor.nan_to_num(7)
