"""The compiled kernels against the same in torch operations."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from apiary_server.model.attention import ChunkRun, DecodeRun, chunk, decode
from apiary_server.model.backends.cpu.attention import Chunk, Decode
from buzz import Buffers, Rotary, State
from buzz.eight_bits import rounded
from buzz.quant import Packed

LAYERS, CAPACITY = 2, 170
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
    position = torch.zeros(shape, dtype=torch.int32)
    if dtype != torch.int8:
        return Buffers(keys.to(dtype), values.to(dtype), position, named)
    (keys, key_scales), (values, value_scales) = rounded(keys), rounded(values)
    return Buffers(keys, values, position, named, scales=torch.stack([key_scales, value_scales], dim=2))


def copy(buffers: Buffers) -> Buffers:
    state = {name: tensor.clone() for name, tensor in buffers.state.items()}
    scales = None if buffers.scales is None else buffers.scales.clone()
    keys, values = buffers.keys.clone(), buffers.values.clone()
    return replace(buffers, keys=keys, values=values, state=state, scales=scales)


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
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
    found = Decode()(layer, queries, keys, values, scale, run_of(ours, states, log_n))
    expected = decode(layer, queries, keys, values, scale, run_of(theirs, states, log_n))
    near = 1e-3 if dtype == torch.int8 else 1e-5  # there queries and weights have digits
    assert torch.allclose(found, expected, rtol=1e-5, atol=near)
    for name in ("keys", "values"):
        assert torch.equal(getattr(ours, name).nan_to_num(7), getattr(theirs, name).nan_to_num(7))
    if ours.scales is not None and theirs.scales is not None:
        assert torch.allclose(ours.scales, theirs.scales, rtol=1e-6, equal_nan=True)
    for row, length in enumerate(LENGTHS):
        for name, state in ours.state.items():
            live, twin = (t[row, layer, :, : length + 1] for t in (state, theirs.state[name]))
            assert torch.allclose(live, twin, rtol=1e-5, atol=near)
            beyond = state[row, layer, :, length + 1 :]
            assert torch.equal(beyond, before.state[name][row, layer, :, length + 1 :])
            assert torch.equal(state[:, 0], before.state[name][:, 0]), "another layer was touched"


def in_few_bits(before: Buffers, bits: int, in_cache: bool) -> Buffers:
    """The same memory behind entries that are packed, of which each row has another number."""
    rows, layers, heads, _, dim = before.keys.shape
    counts, room = torch.tensor([0, 1, 32, 69]), 80
    each = [Packed.empty(layers, heads, room, dim, bits, "cpu") for _ in range(rows)]
    for one, count in zip(each, counts.tolist(), strict=True):
        for name in ("key_grid", "value_grid", "channels"):
            getattr(one, name).fill_(math.nan)
        for layer in range(layers):
            keys, values = torch.randn(2, heads, count, dim) * torch.linspace(0, 9, dim)
            if count:
                one.measure(layer, keys)
                one.write(layer, 0, keys, values)
    packed = Packed(*(torch.stack(of) for of in zip(*(one.tensors for one in each), strict=True)))
    packed = packed.using(counts, int(counts.max()), Rotary.of(dim, 2048), in_cache)
    shape = (rows, layers, heads, CAPACITY + room)
    position = torch.randint(100, shape, dtype=torch.int32)
    state = {name: torch.randint(50, shape).to(state.dtype) for name, state in before.state.items()}
    return replace(before, packed=packed, position=position, state=state)


@pytest.mark.parametrize("dim", [32, 64, 96, 128])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("in_cache", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_packed_entries_are_read_as_torch_operations_do(
    dim: int, bits: int, in_cache: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    shape, states = (8, 2, dim), (MASS, VOTES)
    queries, keys, values = heads_of(shape)
    before = in_few_bits(memory(*shape[1:], dtype, states), bits, in_cache)
    ours, theirs = copy(before), copy(before)
    assert before.packed is not None
    counts = torch.as_tensor(before.packed.count)
    lengths = torch.tensor(LENGTHS) + counts
    most = int(lengths.max()) + 1

    def run(cache: Buffers) -> DecodeRun:
        return DecodeRun(slice(0, 4), cache, lengths, 100 + lengths, most, states, None)

    found = Decode()(1, queries, keys, values, dim**-0.5, run(ours))
    expected = decode(1, queries, keys, values, dim**-0.5, run(theirs))
    near = 1e-4 if dtype == torch.float32 else 0.05  # torch rounds what was packed to the cache's dtype
    torch.testing.assert_close(found, expected, rtol=near, atol=near * float(expected.abs().max()))
    assert torch.equal(ours.keys.nan_to_num(7), theirs.keys.nan_to_num(7))
    for row, length in enumerate(lengths.tolist()):
        mass, twin = (t.state["mass"][row, 1, :, : length + 1] for t in (ours, theirs))
        torch.testing.assert_close(mass, twin, rtol=near, atol=near)
        assert torch.equal(
            ours.state["mass"][row, 1, :, length + 1 :], before.state["mass"][row, 1, :, length + 1 :]
        )


@pytest.mark.parametrize("slots", [[3, 1], [1, 2], [0, 2, 3], [2]], ids=str)
@pytest.mark.parametrize(("bits", "in_cache"), [(None, True), (4, True), (4, False)])
def test_rows_lie_in_any_slots(slots: list[int], bits: int | None, in_cache: bool) -> None:
    torch.manual_seed(0)
    shape, states = (9, 3, 64), (MASS, VOTES)
    queries, keys, values = (part[: len(slots)] for part in heads_of(shape))
    before, lengths = memory(*shape[1:], torch.float32, states), torch.tensor(LENGTHS)
    if bits is not None:
        before = in_few_bits(before, bits, in_cache)
        assert before.packed is not None
        counts = torch.as_tensor(before.packed.count)
        lengths = lengths + counts
        before = replace(before, packed=replace(before.packed, count=counts[slots]))
    entries = lengths[slots]

    def run(cache: Buffers) -> DecodeRun:
        most = int(entries.max()) + 1
        return DecodeRun(slice(0, len(slots)), cache, entries, 100 + entries, most, states, None, slots)

    ours, theirs = copy(before), copy(before)
    found = Decode()(1, queries, keys, values, 0.1, run(ours))
    expected = decode(1, queries, keys, values, 0.1, run(theirs))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours.keys.nan_to_num(7), theirs.keys.nan_to_num(7))
    for slot in range(len(LENGTHS)):
        live = slice(0, int(lengths[slot]) + 1 if slot in slots else None)
        for name, state in ours.state.items():
            twin = theirs.state[name]
            torch.testing.assert_close(state[slot, 1, :, live], twin[slot, 1, :, live], rtol=1e-4, atol=1e-4)
        touched = not torch.equal(ours.state["mass"][slot], before.state["mass"][slot])
        assert touched == (slot in slots)


def test_a_row_does_not_depend_on_the_others() -> None:
    torch.manual_seed(0)
    queries, keys, values = heads_of((9, 3, 64))
    cache = memory(3, 64, torch.float32, (MASS,))
    together = copy(cache)
    found = Decode()(0, queries, keys, values, 0.1, run_of(together, (MASS,), None))
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
        one = Decode()(0, *(part[row : row + 1] for part in (queries, keys, values)), 0.1, run)
        assert torch.equal(one[0], found[row])
        assert torch.equal(alone.state["mass"][row], together.state["mass"][row])


def test_large_logits_do_not_overflow() -> None:
    torch.manual_seed(0)
    queries, keys, values = heads_of((9, 3, 64))
    cache = memory(3, 64, torch.float32, ())
    found = Decode()(0, queries * 1e4, keys, values, 10.0, run_of(copy(cache), (), None))
    expected = decode(0, queries * 1e4, keys, values, 10.0, run_of(copy(cache), (), None))
    assert found.isfinite().all()
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_other_types_are_left_to_torch_operations() -> None:
    torch.manual_seed(0)
    queries, keys, values = (part.double() for part in heads_of((9, 3, 64)))
    cache = memory(3, 64, torch.float64, (MASS,))
    twin = copy(cache)
    found = Decode()(1, queries, keys, values, 0.1, run_of(cache, (MASS,), None))
    assert torch.equal(found, decode(1, queries, keys, values, 0.1, run_of(twin, (MASS,), None)))
    assert found.dtype == torch.float64


# entries before, new tokens: less and more than a tile, more than one block of keys
CHUNKS = [(0, 2), (0, 5), (30, 17), (0, 32), (64, 96), (CAPACITY - 3, 3), (3, CAPACITY - 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(
    ("states", "log_n"), [((), None), ((MASS,), None), ((FADING, VOTES), 8), ((VOTES, MASS), None)]
)
def test_many_tokens_of_a_session(
    shape: tuple[int, int, int], dtype: torch.dtype, states: tuple[State, ...], log_n: int | None
) -> None:
    torch.manual_seed(0)
    query_heads, kv_heads, dim = shape
    layer, scale = 1, dim**-0.5
    for entries, tokens in CHUNKS:
        all_rows = memory(kv_heads, dim, dtype, states)
        floats = torch.float32 if dtype == torch.int8 else dtype
        new = torch.randn(2, LAYERS, kv_heads, CAPACITY, dim).to(floats)
        before = all_rows.of_sessions(0)
        before.write((slice(None),), *new)
        for state in states:  # entries that are new have received nothing
            before.state[state.name][..., entries:] = 0
        rows = torch.randn(tokens, query_heads + kv_heads, dim)
        queries, keys = rows.split((query_heads, kv_heads), dim=1)
        values = torch.randn(tokens, 3 + kv_heads, dim)[:, 3:]
        ours, theirs = copy(before), copy(before)
        found, expected = (
            attend(
                layer,
                queries,
                keys,
                values,
                scale,
                ChunkRun(slice(5, 5 + tokens), each, entries, 90, states, log_n),
            )
            for attend, each in ((Chunk(), ours), (chunk, theirs))
        )
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
        assert ours.scales is None or torch.equal(ours.scales, theirs.scales)  # type: ignore[arg-type]
        for name, state in ours.state.items():
            assert torch.allclose(state, theirs.state[name], rtol=1e-5, atol=1e-5), name


def test_many_small_weights_are_not_lost_together() -> None:
    """One entry that matters, and very many whose weights are less than the rounding of its own."""
    entries, dim = 8192, 64
    cache = Buffers.empty(1, 1, entries + 1, dim, torch.int8, "cpu").split(1)
    keys = torch.zeros(1, 1, 1, entries, dim)
    keys[..., 0, 0] = 1.0
    values = torch.ones(1, 1, 1, entries, dim)
    values[..., 0, :] = -1
    cache.write((slice(None), slice(None), slice(None), slice(entries)), keys, values)
    queries = torch.zeros(1, 1, dim)
    count = torch.tensor([entries])
    for share in (0.02, 0.06, 0.1, 0.3):  # of all that are small
        queries[..., 0] = math.log(entries * (1 - share) / share)
        run = DecodeRun(slice(0, 1), cache, count, count, entries + 1, (), None)
        found = Decode()(0, queries, torch.zeros(1, 1, dim), torch.ones(1, 1, dim), 1.0, run)
        assert torch.allclose(found, torch.tensor(2 * share - 1), atol=0.003)


def test_an_entry_that_is_not_finite_shows() -> None:
    for wrong in (math.nan, math.inf):
        for which in range(3):
            cache = Buffers.empty(1, 1, 40, 64, torch.int8, "cpu").split(1)
            cache.write((slice(None),), *torch.randn(2, 1, 1, 1, 40, 64))
            parts = list(torch.randn(3, 1, 1, 64))
            parts[which][..., 5] = wrong
            count = torch.tensor([30])
            run = DecodeRun(slice(0, 1), cache, count, count, 31, (), None)
            found = Decode()(0, *parts, 0.1, run)
            assert not bool(found.isfinite().any())


def test_a_chunk_does_not_depend_on_how_threads_share_it() -> None:
    torch.manual_seed(0)
    rows = torch.randn(150, 15, 64)
    queries, keys, values = rows.split((9, 3, 3), dim=1)
    memory_of = memory(3, 64, torch.float32, (FADING, VOTES))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        cache = Buffers(
            torch.zeros(LAYERS, 3, CAPACITY, 64),
            torch.zeros(LAYERS, 3, CAPACITY, 64),
            memory_of.position[0],
            {name: torch.zeros_like(state[0]) for name, state in memory_of.state.items()},
        )
        run = ChunkRun(slice(0, 150), cache, 0, 0, (FADING, VOTES), None)
        found.append((Chunk()(0, queries, keys, values, 0.1, run), *cache.state.values()))
    torch.set_num_threads(1)
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], other, strict=True))
