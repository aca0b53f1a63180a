"""The arena: leases never overlap whatever their sizes, and the books are exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from apiary_server.sessions.pool import Geometry, Lease, Pool, SlotLayout
from buzz import State

GEOMETRY = Geometry(layers=2, kv_heads=2, head_dim=4, dtype=torch.float32)
LAYOUTS = [SlotLayout(GEOMETRY, capacity, states) for capacity, states in [(10, 1), (3, 0), (17, 2), (40, 0)]]


def pool(slots: int = 12, workspaces: int = 2) -> Pool:
    workspace = SlotLayout.of_workspace(GEOMETRY, 32)
    budget = workspaces * workspace.bytes + slots * LAYOUTS[0].bytes
    return Pool(GEOMETRY, budget, LAYOUTS[0], workspaces, 32, torch.device("cpu"))


class Leases(RuleBasedStateMachine):
    """Leases and releases of four slot sizes and the workspaces; each lease is filled with its own number."""

    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.pool = pool()
        self.held: dict[int, Lease] = {}
        self.number = 0

    @rule(target=leases, layout=st.sampled_from(LAYOUTS))
    def lease(self, layout: SlotLayout) -> Lease | None:
        free = self.pool.free_places(layout, 100)
        lease = self.pool.lease(layout)
        assert (lease is None) == (free == 0)
        if lease is not None:
            self.number = self.number % 255 + 1
            lease.memory.fill_(self.number)
            self.held[id(lease)] = lease
        return lease

    @rule(target=leases)
    def lease_workspace(self) -> Lease | None:
        return self.pool.lease_workspace()

    @rule(lease=consumes(leases))
    def release(self, lease: Lease | None) -> None:
        if lease is not None:
            lease.release()
            lease.release()  # twice is once
            self.held.pop(id(lease), None)

    @invariant()
    def books_are_exact(self) -> None:
        self.pool.check_integrity()
        held = sum(lease.bytes for lease in self.held.values())
        assert self.pool.leased_bytes == held
        assert self.pool.used_bytes == held + 2 * self.pool.workspace_bytes <= self.pool.budget
        assert self.pool.peak_bytes >= self.pool.used_bytes

    @invariant()
    def nobody_wrote_into_anothers_slot(self) -> None:
        for lease in self.held.values():
            assert bool((lease.memory == lease.memory[0]).all())


TestLeases = Leases.TestCase
TestLeases.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_resident_slots_are_exact_arithmetic() -> None:
    memory = pool(slots=12)
    assert memory.places(LAYOUTS[0]) == 12
    leases = [memory.lease(LAYOUTS[0]) for _ in range(12)]
    assert all(lease is not None for lease in leases)
    assert [lease.index for lease in leases if lease is not None] == list(range(12)), "neighbours"
    assert memory.lease(LAYOUTS[0]) is None
    assert memory.used_bytes == memory.budget


def test_other_classes_fill_the_arena_from_the_back() -> None:
    memory = pool()
    other, default = memory.lease(LAYOUTS[2]), memory.lease(LAYOUTS[0])
    assert other is not None
    assert default is not None
    assert default.index == 0
    assert other.index == memory.places(LAYOUTS[2]) - 1


def test_a_slot_is_one_run_of_bytes_that_holds_all_its_tensors() -> None:
    memory = pool()
    lease = memory.lease(LAYOUTS[0])
    assert lease is not None
    buffers = lease.buffers([State("score")])
    assert buffers.keys.shape == buffers.values.shape == (2, 2, 10, 4)
    assert buffers.position.shape == (2, 2, 10)
    assert lease.memory.is_contiguous()
    start = lease.memory.data_ptr()
    for tensor in (buffers.keys, buffers.values, buffers.position, buffers.state["score"]):
        assert start <= tensor.data_ptr() < start + lease.bytes
    buffers.keys.normal_()
    copied = lease.memory.clone()
    buffers.keys.zero_()
    lease.memory.copy_(copied)
    assert bool(buffers.keys.any())


def test_workspaces_are_taken_in_turn() -> None:
    memory = pool(workspaces=2)
    first, second = memory.lease_workspace(), memory.lease_workspace()
    assert first is not None
    assert second is not None
    assert memory.lease_workspace() is None
    used = memory.used_bytes
    first.release()
    assert memory.used_bytes == used, "a workspace counts whether it is taken or not"
    assert memory.lease_workspace() is not None


def test_a_budget_that_is_too_small_says_what_is_needed() -> None:
    with pytest.raises(ValueError, match=r"budget of 100 bytes is too small: 1 workspace\(s\)"):
        Pool(GEOMETRY, 100, LAYOUTS[0], 1, 32, torch.device("cpu"))
