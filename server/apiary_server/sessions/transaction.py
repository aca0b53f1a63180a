"""One turn's hold on a session's cache: it commits whole or not at all.

A turn runs in *segments*: its prompt (cut only where the workspace is full), then each generated token. The
cache is compacted at a segment's end and nowhere else, so what it keeps depends on token counts alone.

Nothing that was committed is overwritten while the turn runs. Appending leaves the old entries in place
(their states, which later queries change, are saved inside the slot). What would overwrite them - a
compaction, quantising what was not, or the change of rotary positions - writes into a second slot instead,
and the first stays as the checkpoint.
"""

from __future__ import annotations

from concurrent.futures import Future

from apiary_server.sessions.fetcher import Found
from apiary_server.sessions.pool import Lease
from apiary_server.sessions.residency import Residency
from apiary_server.sessions.session import Session
from buzz import Cache, CacheState, Policy, Rotary


class Transaction:
    """A running turn's cache. Not thread-safe: the engine thread owns it.

    Args:
        session: whose.
        residency: its memory.
        rotary: the model's.
        policy: of a cache that the turn creates; the session's once it is committed. None: that is it.
    """

    def __init__(
        self, session: Session, residency: Residency, rotary: Rotary, policy: Policy | None = None
    ) -> None:
        self._session = session
        self._policy = policy or session.policy
        self._residency = residency
        self._rotary = rotary
        self._second: Lease | None = None
        self._workspace: Lease | None = None
        self._base: CacheState | None = None  # what to return to; None: there is no cache
        self._coming: Future[Found] | None = None  # what is read from the store
        self._open = False
        self._in_second = False
        self.starved = False  # waiting for the second slot

    @property
    def cache(self) -> Cache:
        """The cache as the turn sees it."""
        if self._session.cache is None:
            raise RuntimeError("the transaction is not open")
        return self._session.cache

    @property
    def place(self) -> Lease:
        """The slot or workspace in which the cache lies now."""
        place = self._workspace or (self._second if self._in_second else self._session.lease)
        if place is None:
            raise RuntimeError("the transaction is not open")
        return place

    @property
    def full(self) -> bool:
        """Whether no further token fits (a cache that evicts always has room)."""
        return self.cache.n >= self._session.layout.capacity

    def open(self) -> bool:
        """Pin the session's slot, and note what to return to; False if there is no memory now."""
        if not self._residency.admit(self._session):
            return False
        self._open, self._in_second, self._base = True, False, None
        self._coming = self._residency.fetch(self._session)
        if self._coming is None:
            self._note_base()
        return True

    def load(self) -> bool:
        """Take in the session's cache if that is in the store; False while it is read."""
        if self._coming is None:
            return True
        if not self._coming.done():
            return False
        found, self._session.rebuild = self._coming.result()
        self._coming = None
        if found is not None:
            self._residency.take_in(self._session, found)
        self._note_base()
        return True

    def begin_segment(self, tokens: int, *, prompt: bool) -> int:
        """Start the next segment of at most `tokens` tokens. Returns how many it has; 0: wait for memory.

        Generated tokens are segments of their own. Several known ones (a replay) are taken at once as far as
        nothing would have been compacted or quantised between them. Without eviction, a prompt that fits
        neither its slot nor the workspace is cut to what fits the slot.
        """
        cache = self.cache
        if not prompt:
            tokens = self._until_compaction(tokens)
        in_workspace, room = min(tokens, self._residency.pool.workspace_entries - cache.n), cache.room
        needs_workspace = in_workspace > room
        tokens = in_workspace if needs_workspace else min(tokens, room)
        rewrites = not needs_workspace and (cache.changes_over(tokens) or cache.makes_room(tokens))
        overwrites = needs_workspace or rewrites or cache.settles(tokens)
        if overwrites and self._base is not None and self._second is None:
            self._second = self._residency.claim(self._session.layout)
            self.starved = self._second is None
            if self.starved:
                return 0
        if needs_workspace:
            self._workspace = self._residency.pool.lease_workspace()
            if self._workspace is None:
                return 0
            cache.copy_to(self._workspace.buffers(cache.states))
        elif rewrites and self._second is not None and not self._in_second:
            cache.copy_to(self._second.buffers(cache.states))
            self._in_second = True
        cache.begin_segment(tokens)
        return tokens

    def end_segment(self) -> int:
        """Compact and quantise what is due, and bring the entries home. Returns how many were evicted."""
        cache = self.cache
        home = self._second or self._session.lease
        moves = self._workspace is not None or (
            self._second is not None and not self._in_second and cache.settles()
        )
        if not moves or home is None:
            return cache.end_segment()
        evicted = cache.end_segment(into=home.buffers(cache.states))
        self._in_second = self._second is not None
        self._release_workspace()
        return evicted

    def commit(self) -> None:
        """What the turn did is the session's state from now on."""
        if self._in_second and self._session.lease is not None:
            self._session.lease.release()
            self._session.lease, self._second = self._second, None
        self._session.policy = self.cache.policy
        self._close()

    def restart(self) -> None:
        """Forget what the turn did so far, and go on from the state before it."""
        self._release_workspace()
        self._in_second = False
        self._restore()

    def rollback(self) -> None:
        """The session is as it was before the turn. Does nothing if the transaction is not open."""
        if not self._open:
            return
        session = self._session
        if self._base is not None:
            self._restore()
        else:
            session.cache = None
            if session.lease is not None:
                session.lease.release()
                session.lease = None
        self._close()

    def _note_base(self) -> None:
        session = self._session
        if session.cache is None:
            self._create_cache()
        elif session.lease is not None:
            self._base = session.cache.state()
            session.lease.save_states(session.cache.n)

    def _restore(self) -> None:
        lease = self._session.lease
        if self._base is None or lease is None:
            self._create_cache()
            return
        cache = self.cache
        cache.buffers = lease.buffers(cache.states)
        cache.restore(self._base)
        lease.restore_states(cache.n)

    def _close(self) -> None:
        self._open = False
        if self._coming is not None:
            self._coming.cancel()
            self._coming = None
        self._release_workspace()
        if self._second is not None:
            self._second.release()
            self._second = None
        self._residency.settle(self._session)

    def _release_workspace(self) -> None:
        if self._workspace is not None:
            self._workspace.release()
            self._workspace = None

    def _create_cache(self) -> None:
        session = self._session
        if session.lease is not None:
            buffers = session.lease.buffers(self._policy.states)
            session.cache = Cache(self._policy, self._rotary, buffers)

    def _until_compaction(self, tokens: int) -> int:
        cache = self.cache
        if any(state.per == "segment" for state in cache.states):
            return 1
        count = 1
        while count < tokens and not cache.settles(count):
            if cache.changes_over(count + 1) or cache.makes_room(count + 1):
                break
            count += 1
        return count
