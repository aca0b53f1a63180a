"""The compiled kernels against torch's operations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from apiary_server.model.backends.cpu.linear import Packed
from apiary_server.model.backends.cpu.operations import Kernels
from apiary_server.model.operations import Norm, Operations

SHAPES = [(1, 8), (3, 40), (16, 576), (300, 576)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("more", [True, False])
def test_norm(shape: tuple[int, int], more: bool) -> None:
    torch.manual_seed(0)
    norm = Norm(torch.randn(shape[1]), 1e-3)
    rows, added = torch.randn(*shape) * 3, torch.randn(*shape) if more else None
    ours, theirs = rows.clone(), rows.clone()
    found = Kernels(Packed).add_norm(norm, ours, added)
    expected = Operations().add_norm(norm, theirs, added)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(ours, theirs)
    assert torch.equal(ours, rows if added is None else rows + added)


@pytest.mark.parametrize("count", [1, 5, 300])
@pytest.mark.parametrize(("heads", "dim"), [(12, 64), (3, 128), (1, 10)])
def test_rotation(count: int, heads: int, dim: int) -> None:
    torch.manual_seed(0)
    wider = torch.randn(count, heads + 2, dim)
    angles = torch.randn(count, 1, dim // 2) * 100
    expected = Operations().rotate(wider[:, :heads].clone(), angles.cos(), angles.sin())
    behind = wider[:, heads:].clone()
    found = Kernels(Packed).rotate(wider[:, :heads], angles.cos(), angles.sin())
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(wider[:, heads:], behind), "heads that are not rotated were touched"


@pytest.mark.parametrize("shape", SHAPES)
def test_gate(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    rows = torch.randn(shape[0], 2 * shape[1]) * 10
    expected = Operations().gated(rows, nn.SiLU())
    assert torch.allclose(Kernels(Packed).gated(rows, nn.SiLU()), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(Kernels(Packed).gated(rows, nn.GELU()), Operations().gated(rows, nn.GELU()))


def test_the_gate_of_extreme_values() -> None:
    first = torch.tensor([[-1e30, -200.0, -90.0, 0.0, 90.0, 200.0, 1e30, math.nan]])
    rows = torch.cat([first, torch.ones_like(first)], dim=1)
    found = Kernels(Packed).gated(rows, nn.SiLU())
    expected = torch.tensor([[0.0, 0.0, 0.0, 0.0, 90.0, 200.0, 1e30, math.nan]])
    assert torch.allclose(found, expected, atol=1e-6, equal_nan=True)
