from __future__ import annotations

import pytest
import torch
from torch import Tensor

from buzz.moving import keep

LAYERS, HEADS, ENTRIES, WIDTH = 2, 3, 40, 8


def survivors(count: int) -> Tensor:
    chosen = torch.rand(LAYERS, HEADS, ENTRIES, generator=torch.Generator().manual_seed(count)).argsort(
        dim=-1
    )
    return chosen[..., :count].sort(dim=-1).values


@pytest.mark.parametrize("count", [1, 7, 39, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("width", [WIDTH, 1])
def test_what_stays_comes_to_the_front(count: int, dtype: torch.dtype, width: int) -> None:
    entries = torch.arange(LAYERS * HEADS * ENTRIES * width).to(dtype).view(LAYERS, HEADS, ENTRIES, width)
    index = survivors(count)
    expected = entries.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, width))
    elsewhere = torch.full((LAYERS, HEADS, ENTRIES + 5, width), -1).to(dtype)
    keep(entries, elsewhere, index)
    assert torch.equal(elsewhere[:, :, :count], expected)
    assert bool((elsewhere[:, :, count:] == -1).all())
    rest = entries[:, :, count:].clone()
    keep(entries, entries, index)
    assert torch.equal(entries[:, :, :count], expected)
    assert torch.equal(entries[:, :, count:], rest)


def test_heads_and_layers_may_lie_apart() -> None:
    memory = torch.randn(HEADS, 2, LAYERS, ENTRIES, WIDTH)
    entries = memory[:, 1].transpose(0, 1)
    index = survivors(11)
    expected = entries.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, WIDTH))
    other = memory[:, 0].clone()
    keep(entries, entries, index)
    assert torch.equal(entries[:, :, :11], expected)
    assert torch.equal(memory[:, 0], other)
