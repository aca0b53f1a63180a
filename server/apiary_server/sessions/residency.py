"""Which sessions' caches are in memory: leases slots, and moves the least recently used down to free some."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

from torch import Tensor

from apiary_server.errors import BudgetExhausted
from apiary_server.sessions.fetcher import Found
from apiary_server.sessions.parking import Parking
from apiary_server.sessions.pool import Lease, Pool, SlotClass, SlotLayout
from apiary_server.sessions.restored import Restored
from apiary_server.sessions.session import Session
from apiary_server.sessions.snapshot import Image, history
from buzz import Buffers


class Lower(Protocol):
    """Where caches are when they are in memory no more."""

    def keeps(self, session: Session) -> bool:
        """Whether a session's cache is there as it is."""

    def turns(self, session: Session) -> int:
        """How many of a session's turns the cache has that is there; 0 if there is none."""

    def hurry(self, session: Session) -> bool:
        """Have it there soon; False if that cannot be now."""

    def fetch(self, session: Session) -> Future[Found]:
        """Read a session's cache, for a turn that has begun; see `Fetcher.fetch`."""

    def release(self, session: Session, *, held: bool = False) -> bool:
        """Have no turn find a session's cache in memory any more; False if one has begun, unless the caller
        has it (`held`)."""


class Residency:
    """Slots for turns, from the pool's free ones or from idle sessions that move down: to host memory, and
    where that is full, the least recently used from there to the store.

    A turn leases one slot when it starts (`admit`) and, if it will overwrite a committed cache, a second one
    (`claim`), so that the first stays behind as the state to roll back to. Admission always leaves
    `reserve` free places for each layout that a running turn may still claim. So one turn at least can claim,
    finish and give its slot back: turns wait for memory, but never for each other.

    Not thread-safe: the engine thread owns it.

    Attributes:
        waits: whether there was no room just now, but there will be, since a cache is being stored.
        moves: how many caches went where: `parked`, `unparked`, `stored`, `loaded`; or were `lost`, since the
            store could take none.
    """

    def __init__(
        self, pool: Pool, reserve: int, parked_budget: int, parking: Parking, lower: Lower | None = None
    ) -> None:
        self.pool = pool
        self.reserve = reserve
        self.parked_budget = parked_budget
        self.parked_bytes = 0
        self.waits = False
        self.moves: Counter[str] = Counter()
        self._parking = parking
        self._lower = lower
        self._idle: OrderedDict[int, Session] = OrderedDict()  # least recently used first
        self._parked: OrderedDict[int, Session] = OrderedDict()  # likewise
        self._running: dict[SlotLayout, int] = {}

    @property
    def parked_sessions(self) -> int:
        """Sessions whose cache is in host memory."""
        return len(self._parked)

    @property
    def resident_sessions(self) -> int:
        """Sessions whose cache is in the pool, idle or with a turn in flight."""
        return len(self._idle) + sum(self._running.values())

    def admit(self, session: Session) -> bool:
        """Bring the session's cache into the pool, if it is in memory, and pin its slot there; False if there
        is no room now."""
        if id(session) in self._idle:
            del self._idle[id(session)]
        else:
            lease = self._lease_first(session.layout)
            if lease is None:
                return False
            session.lease = lease
            if session.parked is not None and session.cache is not None:
                self._parking.unpark(session.parked, lease.memory)
                session.cache.buffers = lease.buffers(session.policy.states)
                self._forget(session, session.parked)
                self.moves["unparked"] += 1
        self._running[session.layout] = self._running.get(session.layout, 0) + 1
        return True

    def seen(self, session: Session) -> int:
        """How many of a session's tokens its cache has, or will have when it was read."""
        cache = session.cache  # once: it may be let go meanwhile
        if cache is not None:
            return cache.seen
        turns = 0 if self._lower is None else self._lower.turns(session)
        return session.turns[turns - 1].seen if turns else 0

    def fetch(self, session: Session) -> Future[Found] | None:
        """Have a session's cache read that was brought into the pool without; None if there is none to be
        read."""
        if self._lower is None or session.cache is not None or not session.turns:
            return None
        return self._lower.fetch(session)

    def take_in(self, session: Session, found: Restored) -> None:
        """Write what was read to the session's slot."""
        if session.lease is None:
            raise RuntimeError("the session has no slot")
        session.cache = found.place(session, session.lease)
        self.moves["loaded"] += 1

    def claim(self, layout: SlotLayout) -> Lease | None:
        """A second slot for a running turn, or None if it has to wait."""
        return self._lease(layout, leaving=set())

    def make_room(self, waiting: Sequence[Session]) -> bool:
        """Where nothing goes on for want of room: leave a cache to the store, of an idle session or of the
        first of these, whose turns have not started. Where the store takes none, one is lost: to compute it
        anew is better than to serve nobody.

        Returns:
            Whether there is more room, or will be; always, if there is a store.
        """
        lower = self._lower
        if lower is None:
            return False
        idle = self._unused() if self._idle else []
        resident = [session for session in waiting if session.lease is not None]
        if self.waits or self._store_first(lower, idle) or self._store_first(lower, resident, held=True):
            return True
        if any(lower.hurry(session) for session in (*idle, *resident)):
            return True
        if any(self._leave(lower, session, "lost", held=False) for session in idle):
            return True
        if any(self._leave(lower, session, "lost", held=True) for session in resident):
            return True
        return any(session.busy for session in self._idle.values())  # on their way to the queue, or changed

    def lease_beside(self, session: Session) -> Lease | None:
        """A slot for a copy of a session's cache, which is idle and stays where it is; None if there is no
        room now."""
        idle = self._idle.pop(id(session), None)  # so that it is not what moves out
        lease = self._lease_first(session.layout)
        if idle is not None:
            self._idle[id(session)] = session
        return lease

    def may_have_room(self, but: Session) -> bool:
        """Whether there may be room soon where there was none just now: a cache is being stored, or a turn is
        in flight beside that of a session."""
        others = (*self._parked.values(), *self._idle.values())
        return self.waits or bool(self._running) or any(each.busy and each is not but for each in others)

    def copy(self, session: Session, into: Session, lease: Lease) -> None:
        """Give a session a copy of another's cache, in a slot from `lease_beside`."""
        if session.cache is None:
            raise RuntimeError("the session has no cache in memory")
        if session.lease is not None:
            lease.memory.copy_(session.lease.memory)
        elif session.parked is not None:
            self._parking.unpark(session.parked, lease.memory)
        into.lease, into.cache = lease, session.cache.twin(lease.buffers(session.policy.states))
        self._idle[id(into)] = into

    def may_hand_over(self, session: Session) -> bool:
        """Whether `hand_over` can give a session's cache away now; else the store is asked to have it soon,
        and `waits` tells whether it will."""
        if self._lower is None or session.cache is None:
            return False
        kept = self._lower.keeps(session)
        self.waits |= not kept and self._lower.hurry(session)
        return kept

    def hand_over(self, session: Session, into: Session) -> bool:
        """Give a session another's cache where there is no room for a copy: the other, whose turn the caller
        has, is left to the store. False if that does not have it."""
        if self._lower is None or session.cache is None or not self._lower.keeps(session):
            return False
        tier = self._idle if session.parked is None else self._parked
        del tier[id(session)]
        tier[id(into)] = into
        into.cache, into.lease, into.parked = session.cache, session.lease, session.parked
        session.lease = session.parked = None
        self._lower.release(session, held=True)
        session.cache = None  # where it was deleted meanwhile, too
        self.moves["stored"] += 1
        return True

    def image(self, session: Session, memory: Tensor) -> Image | None:
        """Copy what a session has committed.

        Args:
            session: whose.
            memory: host memory, uint8, at least as large as its slot.

        Returns:
            None if its cache is not in memory, or a turn runs on it.
        """
        slot = memory[: session.layout.bytes]
        if session.cache is None:
            return None
        if id(session) in self._idle and session.lease is not None:
            slot.copy_(session.lease.memory)
        elif session.parked is not None:
            slot.copy_(self._parking.read(session.parked))
        else:
            return None
        turns = session.cached_turns
        return Image(
            policy=str(session.policy),
            turns=turns,
            epoch=session.epoch,
            history=history(session, turns),
            state=session.cache.state(),
            layout=session.layout,
            slot=slot,
        )

    def has_room(self, layout: SlotLayout) -> bool:
        """Whether there is a free slot, beside the reserve."""
        return self.pool.free_places(layout, self.reserve + 1) > self.reserve

    def receive(self, session: Session, found: Restored) -> bool:
        """Take in the cache of a session, which has none in memory; False if there is no room now."""
        lease = self._lease_first(session.layout)
        if lease is None:
            return False
        session.lease = lease
        self.take_in(session, found)
        self._idle[id(session)] = session
        return True

    def look(self, session: Session) -> Buffers | None:
        """Where the entries of an idle session lie, in its slot or in host memory, to be read at once. None
        if it has no cache."""
        if session.cache is None:
            return None
        if session.parked is None:
            return session.cache.buffers
        memory = self._parking.read(session.parked)
        return SlotClass(session.layout, memory).buffers(0, session.policy.states)

    def exhausted(self, layout: SlotLayout) -> BudgetExhausted:
        """What to say where there is no room for a slot, and none can be made."""
        return BudgetExhausted(
            "idle sessions fill the cache budget and the parked budget; delete some or let them expire",
            retry_after=5.0,
            needed=layout.bytes,
            used=self.pool.used_bytes,
            budget=self.pool.budget,
        )

    def settle(self, session: Session) -> None:
        """The session's turn is over: unpin what it holds. Sessions with nothing committed hold nothing."""
        self._running[session.layout] -= 1
        if not self._running[session.layout]:
            del self._running[session.layout]
        if session.cache is None or session.deleted or not session.id:
            self.free(session)
        else:
            self._idle[id(session)] = session

    def free(self, session: Session) -> None:
        """Give back all memory of an idle session."""
        self._idle.pop(id(session), None)
        if session.parked is not None:
            self._forget(session, session.parked)
        if session.lease is not None:
            session.lease.release()
            session.lease = None
        session.cache = None

    def check_integrity(self) -> None:
        """Prove that when no turn runs, just the resident sessions hold leases.

        Raises:
            RuntimeError: something leaked.
        """
        self.pool.check_integrity()
        if not self._running:
            held = sum(session.layout.bytes for session in self._idle.values())
            if held != self.pool.leased_bytes:
                raise RuntimeError(f"sessions hold {held:,} bytes, {self.pool.leased_bytes:,} are leased")

    def _lease_first(self, layout: SlotLayout) -> Lease | None:
        """A slot for a cache whose session may have to claim a second one then."""
        return self._lease(layout, leaving={*self._running, layout})

    def _lease(self, layout: SlotLayout, leaving: set[SlotLayout]) -> Lease | None:
        """A slot that leaves the reserve free for the layouts of `leaving`; moves sessions down to get it."""
        self.waits = False
        while True:
            lease = self.pool.lease(layout)
            if lease is not None:
                if all(self.pool.free_places(other, self.reserve) >= self.reserve for other in leaving):
                    self._parking.settle(lease.memory)
                    return lease
                lease.release()
            if not self._park_oldest() and not self._store_oldest():
                return None

    def _park_oldest(self) -> bool:
        """Copy the least recently used idle session to host memory; False if there is none, or no room."""
        room = self.parked_budget - self.parked_bytes
        session = next((session for session in self._idle.values() if session.layout.bytes <= room), None)
        if session is None or session.lease is None:
            return False
        lease = session.lease
        session.parked = self._parking.park(lease.memory)
        self._parked[id(session)] = session
        self.parked_bytes += lease.bytes
        self.moves["parked"] += 1
        del self._idle[id(session)]
        lease.release()
        session.lease = None
        return True

    def _store_oldest(self) -> bool:
        """Leave the least recently used idle session to the store; False if that has none as it is yet, or
        turns in flight hold all slots: what is parked could only make room for those that are idle."""
        if self._lower is None or not self._idle:
            return False
        unused = self._unused()
        if self._store_first(self._lower, unused):
            return True
        self.waits = any(self._lower.hurry(session) for session in unused)
        return False

    def _unused(self) -> list[Session]:
        """The sessions in memory that have no turn, the least recently used first."""
        return [session for session in (*self._parked.values(), *self._idle.values()) if not session.busy]

    def _store_first(self, lower: Lower, sessions: Sequence[Session], *, held: bool = False) -> bool:
        """Leave the first of some sessions to the store whose cache that has; False if it has none."""
        return any(
            lower.keeps(session) and self._leave(lower, session, "stored", held=held) for session in sessions
        )

    def _leave(self, lower: Lower, session: Session, move: str, *, held: bool) -> bool:
        """Have a session's cache in memory no more; False if a turn has begun, unless the caller has it."""
        if not lower.release(session, held=held):
            return False
        self.free(session)
        self.moves[move] += 1
        return True

    def _forget(self, session: Session, parked: Tensor) -> None:
        self._parking.forget(parked)
        session.parked = None
        del self._parked[id(session)]
        self.parked_bytes -= session.layout.bytes
