from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apiary_server.model.backends.cpu import moving
from buzz.moving import _keep, keep


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    try:
        moving.register()
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


def test_the_kernel_is_what_runs() -> None:
    """Else it would be a test of torch against itself."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key("buzz::keep", "CPU")
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("buzz::keep", "CUDA")


def test_an_index_may_be_a_view() -> None:
    entries = torch.randn(2, 3, 20, 4)
    index = torch.arange(20).flip(0).expand(2, 3, 20).flip(-1)[..., ::2]
    assert not index.is_contiguous()
    found = torch.zeros_like(entries)
    keep(entries, found, index)
    assert torch.equal(found[:, :, :10], entries[:, :, ::2])
