from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from buzz import Record, State, attend_chunk, attend_decode, attention

SUM, FADING, VOTE = State("sum"), State("fading", decay=0.9), State("vote", "vote")
SEEN = 1000  # tokens before those attended with
START = {"sum": 2.0, "fading": 3.0, "vote": -7}


@dataclass
class Plain:
    """One query row after the other, one head after the other: outputs, and what is recorded from START."""

    output: Tensor
    state: dict[str, Tensor]


def plain(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, log_n: int | None = None, seen: int = SEEN
) -> Plain:
    heads, count, _ = query.shape
    group, n = heads // keys.shape[0], keys.shape[1]
    done = Plain(torch.zeros_like(query), started(keys.shape[0], n - count, count))
    for row in range(count):
        view = n - count + row + 1
        done.state["fading"] *= 0.9
        for head in range(heads):
            logits = keys[head // group, :view] @ query[head, row] * scale
            if log_n is not None:
                logits = logits * max(1.0, math.log(view) / math.log(log_n))
            weights = (logits - logits.max()).exp()
            weights = weights / weights.sum()
            done.output[head, row] = weights @ values[head // group, :view]
            done.state["sum"][head // group, :view] += weights
            done.state["fading"][head // group, :view] += weights
            done.state["vote"][head // group, :view][weights >= 1 / view] = seen + row
    return done


def started(kv_heads: int, old: int, new: int) -> dict[str, Tensor]:
    """The three states `[kv_heads, old + new]`: old entries at their START, new masses at 0."""
    state = {}
    for s in (SUM, FADING, VOTE):
        dtype = torch.int32 if s.kind == "vote" else torch.float64
        state[s.name] = torch.full((kv_heads, old + new), START[s.name], dtype=dtype)
        if s.kind == "mass":
            state[s.name][:, old:] = 0
    return state


def records(state: dict[str, Tensor]) -> list[Record]:
    return [Record(s, state[s.name]) for s in (SUM, FADING, VOTE)]


def tensors(*sizes: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*sizes, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize(("count", "n"), [(1, 1), (1, 40), (40, 40), (37, 60)])
@pytest.mark.parametrize("log_n", [None, 16])
def test_chunk(
    kv_heads: int, group: int, count: int, n: int, log_n: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, keys, values = (
        tensors(kv_heads * group, count, 8),
        tensors(kv_heads, n, 8),
        tensors(kv_heads, n, 8),
    )
    expected = plain(query, keys, values, 0.3, log_n)
    for logits in (attention._LOGITS, 1):  # in one block, and in blocks of 16 rows
        monkeypatch.setattr(attention, "_LOGITS", logits)
        state = started(kv_heads, n - count, count)
        output = attend_chunk(query, keys, values, 0.3, records(state), SEEN, log_n)
        torch.testing.assert_close(output, expected.output)
        torch.testing.assert_close(state, expected.state)
        torch.testing.assert_close(
            attend_chunk(query, keys, values, 0.3, log_n=log_n), output, rtol=0, atol=0
        )
    given = START["sum"] * kv_heads * (n - count)
    assert state["sum"].sum() - given == pytest.approx(kv_heads * group * count)


@pytest.mark.parametrize(("batch", "kv_heads"), [(1, 1), (1, 3), (5, 2), (2, 4)])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("log_n", [None, 16])
def test_decode_on_a_strided_view_with_garbage_beyond_the_lengths(
    batch: int, kv_heads: int, group: int, log_n: int | None
) -> None:
    layers, capacity, dim, n = 3, 50, 8, 45
    keys, values = (tensors(batch, layers, kv_heads, capacity, dim)[:, 1, :, :n] for _ in range(2))
    query = tensors(batch, kv_heads * group, dim)
    lengths = torch.randint(1, n + 1, (batch,))
    lengths[-1] = n
    if batch > 1:
        lengths[0] = 1
    pool = {
        name: state.expand(batch, layers, -1, -1).clone()
        for name, state in started(kv_heads, capacity, 0).items()
    }
    for row, length in enumerate(lengths.tolist()):
        for name in ("sum", "fading"):
            pool[name][row, 1, :, length - 1] = 0  # the new token
    into = records({name: memory[:, 1, :, :n] for name, memory in pool.items()})
    seen = SEEN + 10 * torch.arange(batch)
    clean_keys, clean_values = keys.clone(), values.clone()
    for row, length in enumerate(lengths.tolist()):
        for tensor, garbage in ((keys, torch.nan), (values, torch.inf)):
            tensor[row, :, length:] = garbage if row % 2 else torch.nan
    output = attend_decode(query, keys, values, lengths, 0.3, into, seen, log_n)
    for row, length in enumerate(lengths.tolist()):
        mine = clean_keys[row, :, :length], clean_values[row, :, :length]
        expected = plain(query[row].unsqueeze(1), *mine, 0.3, log_n, int(seen[row]))
        torch.testing.assert_close(output[row], expected.output.squeeze(1))
        for name, memory in pool.items():
            torch.testing.assert_close(memory[row, 1, :, :length], expected.state[name])
    for name, memory in pool.items():
        assert (memory[:, [0, 2]] == START[name]).all()
        assert (memory[:, :, :, n:] == START[name]).all()
    fused = attend_decode(query, keys, values, lengths, 0.3, log_n=log_n)
    torch.testing.assert_close(fused, output, rtol=0, atol=1e-12)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize(("batch", "kv_heads"), [(1, 3), (5, 2), (2, 4)])
def test_memory_that_is_finite_is_not_looked_at(
    monkeypatch: pytest.MonkeyPatch, batch: int, kv_heads: int, contiguous: bool
) -> None:
    monkeypatch.delattr(attention, "_forget_garbage")
    n, lengths = 12, torch.arange(12, 12 - batch, -1)
    query = tensors(batch, 2 * kv_heads, 4)
    keys, values = (tensors(batch, 2, kv_heads, n, 4)[:, 1] for _ in range(2))
    if contiguous:
        keys, values = keys.contiguous(), values.contiguous()
    state = {name: torch.stack([into] * batch) for name, into in started(kv_heads, n, 0).items()}
    seen = SEEN + torch.arange(batch)
    output = attend_decode(query, keys, values, lengths, 0.3, records(state), seen, finite=True)
    fused = attend_decode(query, keys, values, lengths, 0.3, finite=True)
    torch.testing.assert_close(fused, output, rtol=0, atol=1e-12)
    for row, length in enumerate(lengths.tolist()):
        mine = keys[row, :, :length], values[row, :, :length]
        expected = plain(query[row].unsqueeze(1), *mine, 0.3, None, int(seen[row]))
        torch.testing.assert_close(output[row], expected.output.squeeze(1))
        for name, memory in state.items():
            torch.testing.assert_close(memory[row, :, : length - 1], expected.state[name][:, :-1])


def test_votes_are_refused_without_the_tokens_seen_before() -> None:
    query, keys, state = tensors(1, 2, 4), tensors(1, 2, 3, 4), started(2, 2, 1)
    with pytest.raises(ValueError, match="votes need the tokens seen before"):
        attend_decode(
            query,
            keys,
            keys,
            torch.tensor([3]),
            0.5,
            records({name: into[None] for name, into in state.items()}),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_agree_with_torch(dtype: torch.dtype) -> None:
    query, keys, values = (
        tensors(6, 30, 16, dtype=dtype),
        tensors(2, 70, 16, dtype=dtype),
        tensors(2, 70, 16, dtype=dtype),
    )
    causal = torch.ones(30, 70, dtype=torch.bool).tril(40)
    batched = (t.unsqueeze(0).float() for t in (query, keys, values))
    expected = scaled_dot_product_attention(*batched, attn_mask=causal, scale=0.25, enable_gqa=True)[0]
    tolerance = {"rtol": 0.0, "atol": 1e-5 if dtype == torch.float32 else 0.05}
    chunk = attend_chunk(query, keys, values, 0.25)
    last = attend_decode(query[None, :, -1], keys[None], values[None], torch.tensor([70]), 0.25)
    assert chunk.dtype == last.dtype == dtype
    torch.testing.assert_close(chunk.float(), expected, **tolerance)
    torch.testing.assert_close(last[0].float(), expected[:, -1], **tolerance)


def test_a_narrower_cache_costs_its_own_rounding_only() -> None:
    query, keys, values = (
        tensors(4, 9, 16, dtype=torch.float32),
        tensors(2, 30, 16).bfloat16(),
        tensors(2, 30, 16).bfloat16(),
    )
    expected = plain(query.double(), keys.double(), values.double(), 0.25)
    mass = started(2, 21, 9)["sum"].float()
    output = attend_chunk(query, keys, values, 0.25, [Record(SUM, mass)])
    torch.testing.assert_close(output.double(), expected.output, rtol=0, atol=1e-5)
    torch.testing.assert_close(mass.double(), expected.state["sum"], rtol=0, atol=1e-5)
    lengths = torch.tensor([30])
    last = attend_decode(query[None, :, -1], keys[None], values[None], lengths, 0.25)
    torch.testing.assert_close(last[0].double(), expected.output[:, -1], rtol=0, atol=1e-5)


def test_large_logits_stay_finite() -> None:
    query, keys = tensors(2, 5, 8, dtype=torch.float32) * 1000, tensors(1, 9, 8, dtype=torch.float32) * 1000
    mass = torch.zeros(1, 9)
    assert attend_chunk(query, keys, keys, 1.0, [Record(SUM, mass)]).isfinite().all()
    assert mass.sum() == pytest.approx(10, abs=1e-4)


def test_a_sessions_own_nan_stays_its_own() -> None:
    query, keys, values = tensors(3, 2, 4), tensors(3, 1, 6, 4), tensors(3, 1, 6, 4)
    values[1, 0, 2] = torch.nan
    output = attend_decode(query, keys, values, torch.tensor([6, 6, 6]), 0.5)
    assert output[1].isnan().all()
    assert output[[0, 2]].isfinite().all()
