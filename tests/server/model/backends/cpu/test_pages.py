from __future__ import annotations

import pytest
import torch

from apiary_server.model.backends.cpu import pages
from apiary_server.model.backends.cpu.pages import HugePages


def test_copies_lie_in_lines_of_their_own() -> None:
    memory = HugePages()
    tensors = [torch.randn(7, 5).t(), torch.arange(3, dtype=torch.int8), torch.randn(4, 2)]
    copies = [memory.keep(tensor) for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        assert torch.equal(copy, tensor)
        assert copy.is_contiguous()
        assert copy.data_ptr() % 64 == 0
    assert copies[1].data_ptr() - copies[0].data_ptr() == 192  # 140 bytes, rounded up
    copies[1].zero_()
    assert torch.equal(copies[0], tensors[0])
    assert torch.equal(copies[2], tensors[2])


def test_more_than_is_asked_of_the_system_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_CHUNK", 2**12)
    memory = HugePages()
    tensors = [torch.full((count,), float(count)) for count in (1000, 500, 5000, 1, 0)]
    copies = [memory.keep(tensor) for tensor in tensors]
    assert all(map(torch.equal, copies, tensors))
