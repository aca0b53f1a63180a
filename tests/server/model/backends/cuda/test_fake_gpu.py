"""The guard of the tests on a fake GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.server.model.backends.cuda.fake_gpu import NoWaiting, fake_gpu

WAITING: dict[str, Callable[[Tensor], object]] = {
    "a value": lambda tensor: tensor.sum().item(),
    "a condition": lambda tensor: bool(tensor.any()),
    "a mask": lambda tensor: tensor[tensor > 0],
    "a list": lambda tensor: tensor.tolist(),
    "a copy": lambda tensor: tensor.cpu(),
    "two devices": lambda tensor: tensor.index_select(0, torch.zeros(1, dtype=torch.int64)),
}


@pytest.mark.parametrize("name", WAITING)
def test_it_refuses(name: str) -> None:
    with fake_gpu() as gpu:
        tensor = torch.empty(4, device=gpu)
        with NoWaiting(), pytest.raises(Exception):  # noqa: B017, PT011  # of many kinds
            WAITING[name](tensor)


def test_indexing_is_that_of_tensors() -> None:
    index = torch.tensor([2, 0])
    with fake_gpu() as gpu:
        fake, own = torch.empty(3, 4, 5, 6, device=gpu), torch.tensor([2, 0], device=gpu)
        shapes = [
            fake[1].shape,
            fake[..., 1:3].shape,
            fake[:, None, 2].shape,
            fake[own, 1, :, own].shape,
            fake[own[:, None], own].shape,
        ]
        fake[own, :, 2] = torch.ones(2, 4, 6, device=gpu)
        fake[:, :2] = 0
    real = torch.empty(3, 4, 5, 6)
    assert shapes == [
        real[1].shape,
        real[..., 1:3].shape,
        real[:, None, 2].shape,
        real[index, 1, :, index].shape,
        real[index[:, None], index].shape,
    ]
