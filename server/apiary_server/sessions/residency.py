"""Which sessions' caches are in the pool: leases slots, and parks the least recently used to free some."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor

from apiary_server.errors import BudgetExhausted
from apiary_server.sessions.parking import Parking
from apiary_server.sessions.pool import Lease, Pool, SlotLayout
from apiary_server.sessions.session import Session


class Residency:
    """Slots for turns, from the pool's free ones or from idle sessions that move to host memory.

    A turn leases one slot when it starts (`admit`) and, if it will overwrite a committed cache, a second one
    (`claim`), so that the first stays behind as the state to roll back to. Admission always leaves
    `reserve` free places for each layout that a running turn may still claim. So one turn at least can claim,
    finish and give its slot back: turns wait for memory, but never for each other.

    Not thread-safe: the engine thread owns it.
    """

    def __init__(self, pool: Pool, reserve: int, parked_budget: int, parking: Parking) -> None:
        self.pool = pool
        self.reserve = reserve
        self.parked_budget = parked_budget
        self._parking = parking
        self.parked_bytes = 0
        self.parked_sessions = 0
        self._idle: OrderedDict[int, Session] = OrderedDict()  # least recently used first
        self._running: dict[SlotLayout, int] = {}

    @property
    def resident_sessions(self) -> int:
        """Sessions whose cache is in the pool, idle or with a turn in flight."""
        return len(self._idle) + sum(self._running.values())

    def admit(self, session: Session) -> bool:
        """Bring the session's cache into the pool and pin it there; False if there is no room now."""
        if id(session) in self._idle:
            del self._idle[id(session)]
        else:
            lease = self._lease(session.layout, leaving={*self._running, session.layout})
            if lease is None:
                return False
            session.lease = lease
            if session.parked is not None and session.cache is not None:
                self._parking.unpark(session.parked, lease.memory)
                session.cache.buffers = lease.buffers(session.policy.states)
                self._forget(session, session.parked)
        self._running[session.layout] = self._running.get(session.layout, 0) + 1
        return True

    def claim(self, layout: SlotLayout) -> Lease | None:
        """A second slot for a running turn, or None if it has to wait."""
        return self._lease(layout, leaving=set())

    def copy(self, session: Session, into: Session) -> bool:
        """Give a session a copy of another's cache, which is idle and stays where it is; False if there is no
        room now."""
        if session.cache is None:
            return True
        idle = self._idle.pop(id(session), None)  # so that it is not what moves out
        lease = self._lease(session.layout, leaving={*self._running, session.layout})
        if idle is not None:
            self._idle[id(session)] = session
        if lease is None:
            return False
        if session.lease is not None:
            lease.memory.copy_(session.lease.memory)
        elif session.parked is not None:
            self._parking.unpark(session.parked, lease.memory)
        into.lease, into.cache = lease, session.cache.twin(lease.buffers(session.policy.states))
        self._idle[id(into)] = into
        return True

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

    def _lease(self, layout: SlotLayout, leaving: set[SlotLayout]) -> Lease | None:
        """A slot that leaves the reserve free for the layouts of `leaving`; parks sessions to get it."""
        while True:
            lease = self.pool.lease(layout)
            if lease is not None:
                if all(self.pool.free_places(other, self.reserve) >= self.reserve for other in leaving):
                    self._parking.settle(lease.memory)
                    return lease
                lease.release()
            if not self._park_oldest():
                return None

    def _park_oldest(self) -> bool:
        """Copy the least recently used idle session to host memory; False if there is none, or no room."""
        room = self.parked_budget - self.parked_bytes
        session = next((session for session in self._idle.values() if session.layout.bytes <= room), None)
        if session is None or session.lease is None:
            return False
        lease = session.lease
        session.parked = self._parking.park(lease.memory)
        self.parked_bytes += lease.bytes
        self.parked_sessions += 1
        del self._idle[id(session)]
        lease.release()
        session.lease = None
        return True

    def _forget(self, session: Session, parked: Tensor) -> None:
        self._parking.forget(parked)
        session.parked = None
        self.parked_bytes -= session.layout.bytes
        self.parked_sessions -= 1
