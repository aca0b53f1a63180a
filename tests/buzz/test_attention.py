from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from buzz import attend_chunk, attend_decode, attention


def plain(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, log_n: int | None = None
) -> tuple[Tensor, Tensor]:
    """One query row after the other, one head after the other: outputs and score mass."""
    heads, count, _ = query.shape
    group, n = heads // keys.shape[0], keys.shape[1]
    output, mass = torch.zeros_like(query), torch.zeros(keys.shape[:2], dtype=query.dtype)
    for head in range(heads):
        for row in range(count):
            seen = n - count + row + 1
            logits = keys[head // group, :seen] @ query[head, row] * scale
            if log_n is not None:
                logits = logits * max(1.0, math.log(seen) / math.log(log_n))
            weights = (logits - logits.max()).exp()
            weights = weights / weights.sum()
            output[head, row] = weights @ values[head // group, :seen]
            mass[head // group, :seen] += weights
    return output, mass


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
    expected, mass = plain(query, keys, values, 0.3, log_n)
    for logits in (attention._LOGITS, 1):  # in one block, and in blocks of 16 rows
        monkeypatch.setattr(attention, "_LOGITS", logits)
        grown = torch.ones(kv_heads, n, dtype=torch.float64)
        torch.testing.assert_close(attend_chunk(query, keys, values, 0.3, grown, log_n), expected)
        torch.testing.assert_close(grown - 1, mass)
        torch.testing.assert_close(attend_chunk(query, keys, values, 0.3, None, log_n), expected)
    assert grown.sum() - grown.numel() == pytest.approx(kv_heads * group * count)


@pytest.mark.parametrize(("batch", "kv_heads"), [(1, 1), (1, 3), (5, 2), (2, 4)])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("log_n", [None, 16])
def test_decode_on_a_strided_view_with_garbage_beyond_the_lengths(
    batch: int, kv_heads: int, group: int, log_n: int | None
) -> None:
    layers, capacity, dim, n = 3, 50, 8, 45
    keys, values = (tensors(batch, layers, kv_heads, capacity, dim)[:, 1, :, :n] for _ in range(2))
    pool = torch.full((batch, layers, kv_heads, capacity), 2.0, dtype=torch.float64)
    mass = pool[:, 1, :, :n]
    query = tensors(batch, kv_heads * group, dim)
    lengths = torch.randint(1, n + 1, (batch,))
    lengths[-1] = n
    if batch > 1:
        lengths[0] = 1
    clean_keys, clean_values = keys.clone(), values.clone()
    for row, length in enumerate(lengths.tolist()):
        for tensor, garbage in ((keys, torch.nan), (values, torch.inf)):
            tensor[row, :, length:] = garbage if row % 2 else torch.nan
    output = attend_decode(query, keys, values, lengths, 0.3, mass, log_n)
    for row, length in enumerate(lengths.tolist()):
        mine = clean_keys[row, :, :length], clean_values[row, :, :length]
        expected, grown = plain(query[row].unsqueeze(1), *mine, 0.3, log_n)
        torch.testing.assert_close(output[row], expected.squeeze(1))
        torch.testing.assert_close(mass[row, :, :length] - 2, grown)
        assert (mass[row, :, length:] == 2).all()
    assert (pool[:, [0, 2]] == 2).all()
    assert (pool[:, :, :, n:] == 2).all()
    torch.testing.assert_close(attend_decode(query, keys, values, lengths, 0.3, None, log_n), output)


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
    expected, mass = plain(query.double(), keys.double(), values.double(), 0.25)
    grown = torch.zeros(2, 30)
    torch.testing.assert_close(
        attend_chunk(query, keys, values, 0.25, grown).double(), expected, rtol=0, atol=1e-5
    )
    torch.testing.assert_close(grown.double(), mass, rtol=0, atol=1e-5)
    lengths = torch.tensor([30])
    last = attend_decode(query[None, :, -1], keys[None], values[None], lengths, 0.25)
    torch.testing.assert_close(last[0].double(), expected[:, -1], rtol=0, atol=1e-5)


def test_large_logits_stay_finite() -> None:
    query, keys = tensors(2, 5, 8, dtype=torch.float32) * 1000, tensors(1, 9, 8, dtype=torch.float32) * 1000
    mass = torch.zeros(1, 9)
    assert attend_chunk(query, keys, keys, 1.0, mass).isfinite().all()
    assert mass.sum() == pytest.approx(10, abs=1e-4)


def test_a_sessions_own_nan_stays_its_own() -> None:
    query, keys, values = tensors(3, 2, 4), tensors(3, 1, 6, 4), tensors(3, 1, 6, 4)
    values[1, 0, 2] = torch.nan
    output = attend_decode(query, keys, values, torch.tensor([6, 6, 6]), 0.5)
    assert output[1].isnan().all()
    assert output[[0, 2]].isfinite().all()
