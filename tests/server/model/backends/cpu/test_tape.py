from __future__ import annotations

import ctypes

import pytest
import torch
from torch import nn

from apiary_server.model.backends.cpu.kernel import Kernel
from apiary_server.model.backends.cpu.linear import Packed
from apiary_server.model.backends.cpu.operations import Kernels
from apiary_server.model.backends.cpu.tape import Tape
from apiary_server.model.operations import Norm, Operations


def test_what_is_recorded_is_not_run_but_played_for_any_number_of_rows() -> None:
    torch.manual_seed(0)
    do, tape, norm = Kernels(Packed), Tape(), Norm(torch.randn(8), 1e-5)
    rows, more = torch.randn(2, 6, 8)
    before = rows.clone()
    with tape.recording():
        output = do.gated(do.add_norm(norm, rows, more), nn.SiLU())
    assert torch.equal(rows, before)
    for count in (0, 2, 6):
        rows.copy_(before)
        output.fill_(7)
        tape(count)
        expected = Operations().gated(norm(before[:count] + more[:count]), nn.SiLU())
        assert torch.allclose(output[:count], expected, atol=1e-6)
        assert bool((output[count:] == 7).all())
        assert torch.equal(rows[count:], before[count:])
    assert set(tape.seconds) == {"norm", "gate"}
    assert min(tape.seconds.values()) > 0


def test_memory_is_used_again_when_nothing_has_it_any_more() -> None:
    tape, norm = Tape(), Kernel("elementwise", "norm")
    with tape.recording():
        first, second = norm.output(4, 8), norm.output(4, 8)
        assert first.data_ptr() != second.data_ptr()
        address, part = first.data_ptr(), first.view(2, 16)[1:]
        del first
        assert norm.output(4, 8).data_ptr() != address, "a part of it is still there"
        del part
        assert norm.output(4, 4).data_ptr() != address
        assert norm.output(4, 8).data_ptr() == address


def test_recording_ends_with_its_context() -> None:
    tape, do = Tape(), Kernels(Packed)
    with pytest.raises(ValueError, match="within"), tape.recording():
        raise ValueError("within")
    found = do.gated(torch.ones(1, 4), nn.SiLU())
    assert torch.allclose(found, torch.full((1, 2), 0.7310586))
    tape(3)
    assert tape.seconds == {}


def test_a_kernel_without_memory_ends_it() -> None:
    calls = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
    def failing(_: int) -> int:
        calls.append(1)
        return 1

    class Task(ctypes.Structure):
        _fields_ = (("rows", ctypes.c_int64),)

    tape = Tape()
    with tape.recording():
        for _ in range(2):
            tape.append("failing", ctypes.cast(failing, ctypes.c_void_p).value, Task())
    with pytest.raises(MemoryError, match="a step of 5 rows"):
        tape(5)
    assert calls == [1] * torch.get_num_threads(), "the second is not reached"
