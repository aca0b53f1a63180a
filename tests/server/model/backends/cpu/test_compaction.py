from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apiary_server.model.backends.cpu import compaction
from buzz.eight_bits import rounded
from buzz.moving import _keep, keep
from buzz.norms import default_norms, norms
from buzz.ranking import default_honeycomb, honeycomb


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    try:
        compaction.register()
    except OSError:
        pytest.skip("the kernels were not built")


@st.composite
def moves(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    layers, heads, entries = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 30))
    kept = draw(st.integers(1, entries))
    chosen = st.lists(st.integers(0, entries - 1), min_size=kept, max_size=kept, unique=True).map(sorted)
    index = torch.tensor([[draw(chosen) for _ in range(heads)] for _ in range(layers)])
    return torch.randn(layers, heads, entries, draw(st.integers(1, 5))), index


@given(moves())
def test_the_kernel_moves_as_torch_does(move: tuple[Tensor, Tensor]) -> None:
    entries, index = move
    expected, found = entries.clone(), torch.full_like(entries, 7)
    _keep(entries, expected, index)
    keep(entries, found, index)
    assert torch.equal(found[:, :, : index.shape[-1]], expected[:, :, : index.shape[-1]])
    assert bool((found[:, :, index.shape[-1] :] == 7).all())
    keep(entries, entries, index)
    assert torch.equal(entries, expected)


@pytest.mark.parametrize("name", ["keep", "honeycomb", "norms"])
def test_the_kernel_is_what_runs(name: str) -> None:
    """Else it would be a test of torch against itself."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"buzz::{name}", "CPU")
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"buzz::{name}", "CUDA")


def test_an_index_may_be_a_view() -> None:
    entries = torch.randn(2, 3, 20, 4)
    index = torch.arange(20).flip(0).expand(2, 3, 20).flip(-1)[..., ::2]
    assert not index.is_contiguous()
    found = torch.zeros_like(entries)
    keep(entries, found, index)
    assert torch.equal(found[:, :, :10], entries[:, :, ::2])


ROUGH = [
    -torch.inf,
    -3.5,
    -1.0,
    -1e-42,
    -0.0,
    0.0,
    1e-42,
    1.0,
    1.0000001,
    7.0,
    torch.inf,
    torch.nan,
    -torch.nan,
]


@st.composite
def combs(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    heads, entries = draw(st.integers(1, 3)), draw(st.integers(1, 70))
    hot = draw(st.integers(0, entries))
    cells = draw(st.integers(0, entries - hot))
    few = st.lists(st.sampled_from(ROUGH), min_size=heads * entries, max_size=heads * entries)
    score = torch.tensor(draw(few)) if draw(st.booleans()) else torch.randn(heads * entries)
    return score.view(1, heads, entries), hot, cells


@given(combs())
def test_the_kernel_chooses_as_torch_does(comb: tuple[Tensor, int, int]) -> None:
    found = honeycomb(*comb)
    assert torch.equal(found, default_honeycomb(*comb))


def test_a_honeycomb_of_other_scores() -> None:
    score = torch.randn(2, 3, 50, dtype=torch.float64)
    assert torch.equal(honeycomb(score, 11, 7), default_honeycomb(score, 11, 7))
    strided = torch.randn(2, 50, 3).transpose(1, 2)
    assert torch.equal(honeycomb(strided, 11, 7), default_honeycomb(strided, 11, 7))
    assert honeycomb(torch.randn(2, 0, 50), 11, 7).shape == (2, 0, 18)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [1, 7, 64, 80])
def test_lengths_are_torchs(dtype: torch.dtype, dim: int) -> None:
    values = torch.randn(2, 3, 30, dim).to(dtype)[:, :, :20]
    values[0, 0, 0], values[1, 2, 19, 0] = 0, torch.nan
    found = norms(values, None, torch.float32)
    torch.testing.assert_close(found, default_norms(values, None, torch.float32), equal_nan=True)


def test_lengths_of_eight_bits_are_exact() -> None:
    codes, scales = (part[:, :, :20] for part in rounded(torch.randn(2, 3, 30, 80)))
    found = norms(codes, scales, torch.float32)
    assert torch.equal(found, default_norms(codes, scales, torch.float32))
    assert norms(codes, scales, torch.float64).dtype == torch.float64


def test_lengths_of_what_the_kernel_does_not_read() -> None:
    values = torch.randn(2, 3, 8, 20).transpose(2, 3)
    assert torch.equal(norms(values, None, torch.float32), default_norms(values, None, torch.float32))
    scales = torch.rand(2, 3, 20)
    assert torch.equal(norms(values, scales, torch.float32), default_norms(values, scales, torch.float32))
    codes, scales = rounded(values)
    strided = scales.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(norms(codes, strided, torch.float32), default_norms(codes, scales, torch.float32))
    with pytest.raises(RuntimeError):
        norms(codes, None, torch.float32)
