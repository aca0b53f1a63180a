"""One arena of cache memory under one exact budget, leased slot by slot.

A *slot* holds one session's entries of all layers in consecutive bytes, so parking it is one copy. Slots of
one size form a *class*. All classes share the arena without borders: a class sees the whole arena as a grid
of its own slot size, `[slots, layers, kv_heads, capacity, head_dim]`, and slot `i` of a class may be leased
while its bytes `[i * size, (i + 1) * size)` overlap no other lease. The default class fills the arena from
the front, the others from the back. *Workspaces* are large slots for prompts, in memory of their own that is
counted once and always.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from buzz import MAX_STATES, Buffers, Policy, State
from buzz.quant import BITS, BLOCK, Packed

_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Geometry:
    """The shape of one cache entry of the served model."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def entry_bytes(self) -> int:
        """Of keys and values in all layers."""
        shapes = Buffers.shapes(self.layers, self.kv_heads, 1, self.head_dim, self.dtype)
        return sum(dtype.itemsize * math.prod(shape) for name, dtype, shape in shapes if name != "position")


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """Where a slot's tensors lie in its bytes. Equal layouts are one capacity class.

    `states` is how many states each entry has; a slot also holds them as they were before the running turn.
    Where entries are quantised to `bits`, there is room for `packed` such and `dense` others.
    """

    geometry: Geometry
    capacity: int
    states: int
    bits: int | None = None
    packed: int = 0
    dense: int | None = None

    @classmethod
    def of(cls, geometry: Geometry, policy: Policy, slack: int) -> Self:
        """The slots of a policy.

        Where it quantises, what lies unquantised is its residual and the block that is quantised next; and as
        a prompt of `slack` tokens comes, half the residual at least.
        """
        capacity = policy.bound + slack if policy.evicts else policy.bound
        if policy.kivi is None:
            return cls(geometry, capacity, len(policy.states))
        dense = min(capacity, max(policy.residual + BLOCK, policy.residual // 2 + slack))
        packed = max(capacity - dense, policy.bound - policy.residual, 0)
        return cls(geometry, capacity, len(policy.states), policy.kivi, packed, dense)

    @classmethod
    def of_workspace(cls, geometry: Geometry, entries: int) -> Self:
        """Workspaces: they serve all policies, and nothing is packed there."""
        return cls(geometry, entries, MAX_STATES, bits=BITS[0])

    def _tensors(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        shape = self.geometry
        tensors = Buffers.shapes(
            shape.layers,
            shape.kv_heads,
            self.capacity,
            shape.head_dim,
            shape.dtype,
            self.bits,
            self.packed,
            self.dense,
        )
        if self.states:
            states = (self.states, shape.layers, shape.kv_heads, self.capacity)
            tensors += [(name, torch.float32, states) for name in ("state", "saved_state")]
        return tensors

    @property
    def bytes(self) -> int:
        """The exact size of one slot."""
        return sum(_aligned(dtype.itemsize * math.prod(shape)) for _, dtype, shape in self._tensors())

    def views(self, memory: Tensor) -> dict[str, Tensor]:
        """The tensors of `memory` uint8 `[slots, bytes]`, each with a leading dimension of slots."""
        views, start = {}, 0
        for name, dtype, shape in self._tensors():
            size = dtype.itemsize * math.prod(shape)
            views[name] = memory[:, start : start + size].view(dtype).view(len(memory), *shape)
            start += _aligned(size)
        return views


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class SlotClass:
    """All slots of one layout, as batched tensors: keys and values `[slots, layers, kv_heads, dense,
    head_dim]`, position `[slots, layers, kv_heads, capacity]`, state and saved_state `[slots, states,
    layers, kv_heads, capacity]` (None where there is no state), memory for quantised entries, and scales
    `[slots, layers, 2, kv_heads, dense]` of such in eight bits."""

    def __init__(self, layout: SlotLayout, memory: Tensor) -> None:
        self.layout = layout
        self.count = memory.numel() // layout.bytes
        self.memory = memory[: self.count * layout.bytes].view(self.count, layout.bytes)
        views = layout.views(self.memory)
        self.keys, self.values, self.position = views["keys"], views["values"], views["position"]
        self.state, self.saved_state = views.get("state"), views.get("saved_state")
        self.packed = None if layout.bits is None else Packed.of(views)
        self.scales = views.get("scales")

    def buffers(self, index: int | slice, states: Sequence[State]) -> Buffers:
        """The tensors of one slot, or with a leading dimension of slots; as many states as asked for."""
        named = {}
        if self.state is not None:
            for number, state in enumerate(states):
                named[state.name] = self.state[index, number].view(state.dtype)
        packed = None if self.packed is None else self.packed.of_sessions(index)
        scales = None if self.scales is None else self.scales[index]
        return Buffers(self.keys[index], self.values[index], self.position[index], named, packed, scales)


class Lease:
    """The right to one slot, until `release` (which may be called twice)."""

    def __init__(self, slots: SlotClass, index: int, free: Callable[[Lease], None]) -> None:
        self.slots = slots
        self.index = index
        self._free: Callable[[Lease], None] | None = free

    @property
    def bytes(self) -> int:
        """What the lease counts for in the budget."""
        return self.slots.layout.bytes

    @property
    def memory(self) -> Tensor:
        """The slot's bytes, uint8 `[bytes]`."""
        return self.slots.memory[self.index]

    def buffers(self, states: Sequence[State]) -> Buffers:
        """The slot's tensors, with as many states as asked for."""
        return self.slots.buffers(self.index, states)

    def save_states(self, n: int) -> None:
        """Set the states of the first `n` entries aside."""
        if self.slots.state is not None and self.slots.saved_state is not None:
            self.slots.saved_state[self.index, ..., :n] = self.slots.state[self.index, ..., :n]

    def restore_states(self, n: int) -> None:
        """Return to the states that were set aside."""
        if self.slots.state is not None and self.slots.saved_state is not None:
            self.slots.state[self.index, ..., :n] = self.slots.saved_state[self.index, ..., :n]

    def release(self) -> None:
        """Give the slot back."""
        free, self._free = self._free, None
        if free is not None:
            free(self)


class Pool:
    """The budget: workspaces, and an arena of slots. Not thread-safe: the engine thread owns it.

    Args:
        geometry: the shape of an entry.
        budget: bytes for everything; what the workspaces leave is the arena.
        default: the layout of the default policy's slots.
        workspaces: how many workspaces there are.
        workspace_entries: the capacity of each.
        device: where the memory lies.

    Raises:
        ValueError: the budget does not hold the workspaces and two default slots (one for a session, one for
            the state before its running turn).
    """

    def __init__(
        self,
        geometry: Geometry,
        budget: int,
        default: SlotLayout,
        workspaces: int,
        workspace_entries: int,
        device: torch.device,
    ) -> None:
        workspace = SlotLayout.of_workspace(geometry, workspace_entries)
        least = workspaces * workspace.bytes + 2 * default.bytes
        if budget < least:
            raise ValueError(
                f"a cache budget of {budget:,} bytes is too small: {workspaces} workspace(s) of "
                f"{workspace.bytes:,} bytes and two slots of {default.bytes:,} need {least:,}"
            )
        self.budget = budget
        self.default = default
        self.workspace_bytes = workspace.bytes
        self.workspace_entries = workspace_entries
        self.workspaces = workspaces
        self.arena_bytes = budget - workspaces * workspace.bytes
        # Zeros, so that the memory is there now: a first touch within a step would stop all streams, and
        # memory that the machine does not have is missed at the start.
        self._arena = torch.zeros(self.arena_bytes, dtype=torch.uint8, device=device)
        self._workspaces = SlotClass(
            workspace, torch.zeros(workspaces * workspace.bytes, dtype=torch.uint8, device=device)
        )
        self._free_workspaces = list(range(workspaces))
        self._classes: dict[SlotLayout, SlotClass] = {}
        self._taken: list[tuple[int, int]] = []  # byte intervals of the leases, in order
        self._leased_bytes = 0
        self._peak_bytes = 0

    @property
    def used_bytes(self) -> int:
        """Workspaces and leased slots."""
        return self.workspaces * self.workspace_bytes + self._leased_bytes

    @property
    def leased_bytes(self) -> int:
        """Leased slots alone: zero when there is no session with a cache and no turn."""
        return self._leased_bytes

    @property
    def peak_bytes(self) -> int:
        """The most that `used_bytes` ever was."""
        return max(self._peak_bytes, self.used_bytes)

    def slots(self, layout: SlotLayout) -> SlotClass:
        """The class of a layout."""
        if layout not in self._classes:
            self._classes[layout] = SlotClass(layout, self._arena)
        return self._classes[layout]

    def places(self, layout: SlotLayout) -> int:
        """How many slots of this layout the empty arena holds."""
        return self.arena_bytes // layout.bytes

    def free_places(self, layout: SlotLayout, most: int) -> int:
        """How many slots of this layout could be leased now, counted up to `most`."""
        count = 0
        index = self._next_free(layout, 0)
        while index is not None and count < most:
            count += 1
            index = self._next_free(layout, index + 1)
        return count

    def lease(self, layout: SlotLayout) -> Lease | None:
        """A slot of this layout, or None if none is free."""
        index = self._next_free(layout, 0) if layout == self.default else self._last_free(layout)
        if index is None:
            return None
        bisect.insort(self._taken, (index * layout.bytes, (index + 1) * layout.bytes))
        self._leased_bytes += layout.bytes
        self._peak_bytes = self.peak_bytes
        return Lease(self.slots(layout), index, self._release)

    def lease_workspace(self) -> Lease | None:
        """A workspace, or None if all are taken."""
        if not self._free_workspaces:
            return None
        index = self._free_workspaces.pop(0)
        return Lease(self._workspaces, index, lambda lease: self._free_workspaces.append(lease.index))

    def check_integrity(self) -> None:
        """Prove the books: leases are disjoint, inside the arena, and sum to what is counted.

        Raises:
            RuntimeError: they do not; memory is corrupt or leaked.
        """
        ends = [0, *(end for _, end in self._taken)]
        starts = [*(start for start, _ in self._taken), self.arena_bytes]
        if any(end > start for end, start in zip(ends, starts, strict=True)):
            raise RuntimeError(f"leases overlap or leave the arena: {self._taken}")
        if sum(end - start for start, end in self._taken) != self._leased_bytes:
            raise RuntimeError("leased bytes are miscounted")
        if self.used_bytes > self.budget:
            raise RuntimeError(f"{self.used_bytes:,} bytes used of a budget of {self.budget:,}")

    def _release(self, lease: Lease) -> None:
        self._taken.remove((lease.index * lease.bytes, (lease.index + 1) * lease.bytes))
        self._leased_bytes -= lease.bytes

    def _next_free(self, layout: SlotLayout, index: int) -> int | None:
        """The first free slot from `index` on."""
        size = layout.bytes
        while (index + 1) * size <= self.arena_bytes:
            blocker = self._blocker(index * size, (index + 1) * size)
            if blocker is None:
                return index
            index = -(-blocker[1] // size)
        return None

    def _last_free(self, layout: SlotLayout) -> int | None:
        """The last free slot."""
        size = layout.bytes
        index = self.arena_bytes // size - 1
        while index >= 0:
            blocker = self._blocker(index * size, (index + 1) * size)
            if blocker is None:
                return index
            index = blocker[0] // size - 1
        return None

    def _blocker(self, start: int, end: int) -> tuple[int, int] | None:
        """A lease that overlaps [start, end)."""
        after = bisect.bisect_left(self._taken, (start + 1,))
        for taken in self._taken[max(after - 1, 0) : after + 1]:
            if taken[0] < end and start < taken[1]:
                return taken
        return None
