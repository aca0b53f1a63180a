from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

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


def test_what_is_looked_up_is_what_would_be_computed() -> None:
    """However far the differences reach, in any order, of any integer dtype, and of none."""
    rotary = Rotary.of(16, 100_000)
    for reach in (1, 3, 700, 8192, 8193, 90_000, 5, 2**30):
        keys, delta = torch.randn(2, 40, 16), torch.randint(-reach, reach, (2, 40))
        delta[0, :2] = torch.tensor([-reach, reach - 1])
        for dtype in (torch.float32, torch.float64):
            expected = rotate_half(keys.double(), delta, rotary.inv_freq)
            for narrow in (delta, delta.int()):
                moved = rotary.rotate(keys.to(dtype), narrow)
                torch.testing.assert_close(moved.double(), expected, rtol=0, atol=1e-6)
    assert rotary.rotate(torch.randn(2, 0, 16), torch.zeros(0, dtype=torch.int64)).shape == (2, 0, 16)


def test_threads_and_modes_share_an_embedding() -> None:
    rotary, keys = Rotary.of(8, 8192), torch.randn(50, 8)
    deltas = [torch.randint(-reach, reach, (50,)) for reach in (4, 6000, 90, 2000) * 25]

    def rotate(delta: Tensor) -> Tensor:
        with torch.inference_mode():
            return rotary.rotate(keys, delta)

    with ThreadPoolExecutor(4) as threads:
        moved = list(threads.map(rotate, deltas))
    for delta, got in zip(deltas, moved, strict=True):
        assert got.equal(Rotary.of(8, 8192).rotate(keys, delta))
    keys.requires_grad_()
    rotary.rotate(keys, deltas[0]).square().sum().backward()  # a rotation keeps lengths
    torch.testing.assert_close(keys.grad, 2 * keys.detach())
