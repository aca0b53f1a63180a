from __future__ import annotations

import pytest
import torch
from torch import Tensor

from buzz import Rotary


def rotate_half(keys: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """The model code's formula: x * cos + rotate_half(x) * sin, both halves with the same angles."""
    angle = (positions[..., None].double() * inv_freq.double()).repeat_interleave(2, dim=-1)
    angle = torch.cat([angle[..., 0::2], angle[..., 1::2]], dim=-1)
    half = keys.shape[-1] // 2
    turned = torch.cat([-keys[..., half:], keys[..., :half]], dim=-1)
    return keys * angle.cos() + turned * angle.sin()


def test_it_is_the_models_rotation() -> None:
    rotary = Rotary.of(16, 8192)
    keys, positions = torch.randn(3, 10, 16, dtype=torch.float64), torch.randint(0, 8192, (3, 10))
    torch.testing.assert_close(rotary.rotate(keys, positions), rotate_half(keys, positions, rotary.inv_freq))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)]
)
def test_rotations_compose(dtype: torch.dtype, tolerance: float) -> None:
    rotary = Rotary.of(8, 8192)
    keys, start, end = (
        torch.randn(2, 50, 8).to(dtype),
        torch.randint(0, 8192, (2, 50)),
        torch.randint(0, 600, (50,)),
    )
    before = keys.clone()
    moved = rotary.rotate(rotary.rotate(keys, start), end - start)
    assert moved.dtype == dtype
    torch.testing.assert_close(keys, before, rtol=0, atol=0)
    torch.testing.assert_close(moved, rotary.rotate(keys, end), rtol=0, atol=tolerance)


def test_dimensions_beyond_the_rotary_ones_pass_through() -> None:
    keys, delta = torch.randn(4, 8), torch.tensor([0, 1, -5, 9])
    rotary = Rotary.of(4, 100)
    moved = rotary.rotate(keys, delta)
    torch.testing.assert_close(moved[:, 4:], keys[:, 4:], rtol=0, atol=0)
    torch.testing.assert_close(moved[:, :4], rotary.rotate(keys[:, :4], delta))
    assert (moved[1:, :4] != keys[1:, :4]).all()
    torch.testing.assert_close(moved[0], keys[0], rtol=0, atol=0)


def test_reduced_precision_rounds_once() -> None:
    rotary = Rotary.of(8, 8192)
    keys, delta = torch.randn(100, 8).bfloat16(), torch.randint(-600, 0, (100,))
    exact = rotary.rotate(keys.double(), delta)
    torch.testing.assert_close(rotary.rotate(keys, delta), exact.to(torch.bfloat16), rtol=2**-8, atol=1e-6)
