"""A cache that comes from a snapshot, checked against the session that it is for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from apiary_server.errors import SnapshotRefused
from apiary_server.sessions.compression import compressed, expand
from apiary_server.sessions.info import RebuildReason
from apiary_server.sessions.pool import Lease
from apiary_server.sessions.session import Session
from apiary_server.sessions.snapshot import Manifest, check, corrupt, fill, history
from buzz import Cache, CacheState, Rotary


@dataclass(frozen=True, slots=True)
class Restored:
    """A session's cache as it was stored: its counts, and what of its slot's tensors is in use, in host
    memory."""

    state: CacheState
    tensors: Mapping[str, Tensor]
    rotary: Rotary

    def place(self, session: Session, lease: Lease) -> Cache:
        """Write it to a slot for the session, and have it there."""
        policy = session.policy
        fill(lease.memory, session.layout, self.state, self.tensors)
        cache = Cache(policy, self.rotary, lease.buffers(policy.states))
        cache.restore(self.state)
        return cache


def restore(
    session: Session, turns: int, manifest: Manifest, tensors: Mapping[str, Tensor], rotary: Rotary
) -> Restored:
    """Check that a snapshot is the cache that a session had after so many turns, or near to it where it was
    compressed.

    Args:
        session: whose turn the caller has.
        turns: at least 1.
        manifest: of the snapshot.
        tensors: the cache's.
        rotary: the model's.

    Raises:
        SnapshotRefused: the snapshot is of other turns or another policy, or does not make such a cache.
    """
    if (manifest.turns, manifest.history) != (turns, history(session, turns)):
        raise SnapshotRefused("it is of turns that were taken back", RebuildReason.RESTARTED)
    if manifest.policy != str(session.policy):
        raise SnapshotRefused(f"it is of the policy {manifest.policy}", RebuildReason.POLICY_CHANGED)
    seen = session.turns[turns - 1].seen
    if manifest.counts is None or manifest.counts.seen != seen:
        raise corrupt(f"it has no cache of {seen} tokens")
    state, policy = manifest.counts.state, session.policy
    layout = session.layout
    if manifest.bits is not None:
        layout = compressed(layout, state, manifest.bits)
    evicted = state.evicted and not policy.evicts
    impossible = (state.packed and not state.measured) or (state.measured and layout.bits is None)
    if state.n > policy.bound or state.sampled > state.n or evicted or impossible:
        raise corrupt(f"{state} is no state of {policy}")
    check(layout, state, tensors)
    if manifest.bits is not None:
        state, tensors = expand(state, tensors, rotary)
    return Restored(state, tensors, rotary)
