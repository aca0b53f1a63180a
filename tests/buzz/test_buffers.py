from __future__ import annotations

import math

import pytest
import torch

from buzz import Buffers, State


@pytest.mark.parametrize(("bits", "packed", "dense"), [(None, 0, None), (4, 0, None), (2, 60, 40)])
def test_memory_is_as_large_as_its_shapes(bits: int | None, packed: int, dense: int | None) -> None:
    sizes = (2, 3, 100, 64, torch.float16)
    memory = Buffers.empty(
        *sizes, "cpu", (State("score"), State("vote", "vote")), bits, packed=packed, dense=dense
    )
    shapes = Buffers.shapes(*sizes, bits, packed, dense)
    states = 2 * 4 * 2 * 3 * 100
    assert memory.nbytes == states + sum(kind.itemsize * math.prod(shape) for _, kind, shape in shapes)
    assert (memory.capacity, memory.dense) == (100, dense or 100)
    assert [state.dtype for state in memory.state.values()] == [torch.float32, torch.int32]


def test_a_workspace_for_quantised_entries_has_no_room_for_them() -> None:
    memory = Buffers.empty(1, 1, 100, 64, torch.float32, "cpu", bits=4)
    assert memory.packed is not None
    assert memory.fits(100)
    assert not memory.fits(100, 1)
    with pytest.raises(ValueError, match="1 packed entries and 99 others do not fit 0 and 100"):
        memory.require(100, 1)


@pytest.mark.parametrize(("bits", "packed", "head_dim"), [(3, 5, 64), (4, 5, 48), (None, 5, 64)])
def test_entries_that_cannot_be_quantised_so_are_refused(
    bits: int | None, packed: int, head_dim: int
) -> None:
    with pytest.raises(ValueError, match="quantised"):
        Buffers.shapes(1, 1, 10, head_dim, torch.float32, bits, packed)
