"""Memory for the caches of several policies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from apiary_server.model.loader import LoadedModel
from buzz import Buffers, Policy, State
from buzz.quant import Packed


class Slab:
    """Memory for several caches, with room for every state that any of the policies records, once.

    States are told apart by what is recorded, not by their policies' names for them.
    """

    def __init__(self, loaded: LoadedModel, policies: Sequence[Policy], slots: int, capacity: int) -> None:
        shape = loaded.geometry
        flat = Buffers.empty(
            slots * shape.layers,
            shape.kv_heads,
            capacity,
            shape.head_dim,
            shape.dtype,
            loaded.backend.device,
            self.states(policies),
        )

        self._memory = flat.split(shape.layers)

    def states(self, policies: Sequence[Policy]) -> tuple[State, ...]:
        """All that these policies record, under this slab's names."""
        found = {_key(state): state for policy in policies for state in policy.states}
        return tuple(replace(state, name=key) for key, state in found.items())

    def memory(self, index: int | slice) -> Buffers:
        """One slot, or several with a leading dimension; states under this slab's names."""
        return self._memory.of_sessions(index)

    def slot(self, index: int, policy: Policy) -> Buffers:
        """One slot, with the policy's states under the policy's names, and nothing quantised there."""
        memory = self.memory(index)
        state = {state.name: memory.state[_key(state)] for state in policy.states}
        packed = None
        if policy.kivi is not None:
            layers, kv_heads, _, head_dim = memory.keys.shape
            packed = Packed.empty(layers, kv_heads, 0, head_dim, policy.kivi, memory.keys.device)
        return replace(memory, state=state, packed=packed)


def _key(state: State) -> str:
    return f"{state.kind} {state.decay} {state.per}"
