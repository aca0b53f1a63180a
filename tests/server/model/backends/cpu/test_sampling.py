"""The sampler's kernel against torch."""

from __future__ import annotations

import pytest
import torch

from apiary_server.model.backends.cpu import sampling
from apiary_server.model.sampler import default_likeliest, likeliest

INF, NAN = float("inf"), float("nan")


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    try:
        sampling.register()
    except OSError:
        pytest.skip("the kernels were not built")


def logits_of(rows: int, vocabulary: int) -> torch.Tensor:
    """Whole numbers, so that many are equal."""
    generator = torch.Generator().manual_seed(vocabulary)
    return torch.randint(-4, 5, (rows, vocabulary), generator=generator).float()


def check(logits: torch.Tensor) -> None:
    tokens, largest = likeliest(logits)
    assert torch.equal(tokens, logits.argmax(dim=-1))
    torch.testing.assert_close(largest, logits.amax(dim=-1), rtol=0, atol=0, equal_nan=True)


def test_the_kernel_is_what_runs() -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("apiary::likeliest", "CPU")
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("apiary::likeliest", "CUDA")


@pytest.mark.parametrize("vocabulary", [1, 2, 63, 64, 1023, 1024, 1025, 3000, 49_152])
def test_the_first_of_the_largest_is_found(vocabulary: int) -> None:
    logits = logits_of(20, vocabulary)
    logits[0], logits[1, vocabulary // 2], logits[2, -1], logits[3] = -INF, INF, NAN, NAN
    logits[4, vocabulary // 3], logits[4, -1] = NAN, NAN
    logits[5], logits[6] = -0.0, 0.0
    logits[5, -1], logits[6, -1] = 0.0, -0.0
    check(logits)
    logits[7, 0] = INF
    logits[7, -1] = NAN
    check(logits[7:8])


def test_rows_may_be_views() -> None:
    logits = logits_of(6, 2100)
    check(logits[::2])
    check(logits[:, :2000])
    check(logits[:0])
    check(logits[:, ::2])
    check(logits.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_the_kernel_does_not_read_goes_to_torch(dtype: torch.dtype) -> None:
    logits = logits_of(5, 2000).to(dtype)
    for found, expected in zip(likeliest(logits), default_likeliest(logits), strict=True):
        assert torch.equal(found, expected)
