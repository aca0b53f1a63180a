"""The table of sessions: who owns what, until when, and whose turn is in flight. Thread-safe, no tensors."""

from __future__ import annotations

import heapq
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

from apiary_server.errors import (
    ApiaryError,
    BudgetExhausted,
    ContextFull,
    InvalidField,
    SessionBusy,
    SessionExists,
    SessionNotFound,
)
from apiary_server.sessions.info import RebuildReason, SessionInfo
from apiary_server.sessions.pool import SlotLayout
from apiary_server.sessions.request import SessionChange
from apiary_server.sessions.session import Answer, Session, TurnRecord, Waiter
from apiary_server.sessions.store import Change, StoredSession
from apiary_server.sessions.stored import change_of, session_of
from buzz import Policy


def resource_name(id: str) -> str:
    """`sessions/{id}`."""
    return f"sessions/{id}"


class SessionManager:
    """All sessions of this worker.

    Args:
        layout: turns a policy's spec (None: the default) into the policy and the layout of its slots;
            raises InvalidField for specs that this worker cannot serve.
        default_ttl: seconds that a session without expiration lives after its last turn.
        limit: the most sessions at once.

    Attributes:
        watchers: called with each session that changed in what outlives the process.
    """

    def __init__(
        self, layout: Callable[[str | None], tuple[Policy, SlotLayout]], default_ttl: float, limit: int
    ) -> None:
        self._layout = layout
        self._default_ttl = default_ttl
        self._limit = limit
        self._lock = threading.Lock()
        self._sessions: dict[tuple[str, str], Session] = {}
        self._next_expiry = float("inf")  # nothing expires before
        self.watchers: list[Callable[[Session], None]] = []

    def __len__(self) -> int:
        return len(self._sessions)

    def create(
        self,
        tenant: str,
        id: str | None,
        policy: str | None,
        expire_time: float | None,
        ttl: float | None,
        labels: Mapping[str, str],
    ) -> Session:
        """Add an empty session. It leases no memory before its first turn.

        Raises:
            InvalidField: the policy is malformed, or larger than this worker can hold.
            SessionExists: the tenant has a session of that id.
            BudgetExhausted: the table is full.
        """
        chosen, layout = self._layout(policy)
        now = time.time()
        if expire_time is None and ttl is None:
            ttl = self._default_ttl
        if ttl is not None:
            expire_time = now + ttl
        session = Session(
            id=id or secrets.token_hex(8),
            tenant=tenant,
            policy=chosen,
            layout=layout,
            ttl=ttl,
            expire_time=expire_time or 0.0,
            labels=dict(labels),
            create_time=now,
            update_time=now,
        )
        with self._lock:
            self._add(session)
        self.changed(session)
        return session

    def changed(self, session: Session) -> None:
        """Tell those who watch that a session changed."""
        for watcher in self.watchers:
            watcher(session)

    def restore(self, stored: StoredSession) -> None:
        """Add a session that outlived the worker before. It has a policy of its own, if this worker can serve
        that, and no cache."""
        rebuild = RebuildReason.RESTARTED
        try:
            policy, layout = self._layout(stored.settings.policy)
        except InvalidField:
            rebuild = RebuildReason.POLICY_CHANGED
            policy, layout = self._layout(None)
        session = session_of(stored, policy, layout, rebuild)
        with self._lock:
            self._sessions[session.tenant, session.id] = session
            self._next_expiry = min(self._next_expiry, session.expire_time)

    def build(self, stored: StoredSession) -> Session:
        """A session that comes from elsewhere, and is in no table yet. Its turn is the caller's.

        Raises:
            InvalidField: this worker cannot serve its policy.
        """
        policy, layout = self._layout(stored.settings.policy)
        session = session_of(stored, policy, layout, RebuildReason.RESTARTED)
        session.stored, session.busy = 0, True
        return session

    def adopt(self, session: Session) -> None:
        """Add a session that was built; its turn is the caller's still, who has to see to its cache.

        Raises:
            SessionExists: the tenant has a session of that id.
            BudgetExhausted: the table is full.
        """
        with self._lock:
            self._add(session)
        self.changed(session)

    def slot_bytes(self, policy: str) -> int:
        """How many bytes a session of a policy has in memory.

        Raises:
            InvalidField: this worker cannot serve it.
        """
        return self._layout(policy)[1].bytes

    def take_changes(self, sessions: Sequence[Session]) -> list[Change]:
        """What the store lacks of sessions; it counts as stored now. Those that are gone come first, since
        others may have their names."""
        with self._lock:
            ordered = sorted(sessions, key=lambda session: not session.deleted)
            return [change_of(session) for session in ordered]

    def put_back(self, sessions: Sequence[Session], changes: Sequence[Change]) -> None:
        """Those changes were not stored after all."""
        kept = {(change.tenant, change.id): change.kept for change in changes if change.settings is not None}
        with self._lock:
            for session in sessions:
                if not session.deleted:
                    session.stored = min(session.stored, kept[session.tenant, session.id])

    def store_anew(self) -> None:
        """The store has nothing of any session any more."""
        with self._lock:
            sessions = list(self._sessions.values())
            for session in sessions:
                session.stored = 0
        for session in sessions:
            self.changed(session)

    def fork(self, session: Session, id: str | None) -> Session:
        """Add a session with the transcript and the settings of another, whose turn the caller has.

        The new one's turn is the caller's, too, who has to see to its cache. A lifetime that counts from the
        last turn begins anew.

        Raises:
            SessionExists: the tenant has a session of that id.
            BudgetExhausted: the table is full.
        """
        now = time.time()
        twin = Session(
            id=id or secrets.token_hex(8),
            tenant=session.tenant,
            policy=session.policy,
            layout=session.layout,
            ttl=session.ttl,
            expire_time=session.expire_time if session.ttl is None else now + session.ttl,
            labels=dict(session.labels),
            create_time=now,
            update_time=now,
            transcript=session.transcript[:],
            turns=list(session.turns),
            rebuild=session.rebuild,
            busy=True,
        )
        with self._lock:
            self._add(twin)
        self.changed(twin)
        return twin

    def get(self, tenant: str, id: str) -> SessionInfo:
        """One session as it is now.

        Raises:
            SessionNotFound: unknown, expired or another tenant's.
        """
        with self._lock:
            return self._find(tenant, id).info()

    def idle(self, tenant: str, id: str) -> Session:
        """A session that has no turn in flight. It may be given one as soon as this returns, but that begins
        on the engine thread.

        Raises:
            SessionNotFound: unknown, expired or another tenant's.
            SessionBusy: a turn is in flight.
        """
        with self._lock:
            session = self._find(tenant, id)
            if session.busy:
                raise _busy(id)
            return session

    def list(self, tenant: str, page_size: int, after: str) -> tuple[Sequence[SessionInfo], str]:
        """The tenant's sessions with ids after `after`, in order; and the last id if more follow, else ""."""
        now = time.time()
        with self._lock:
            ids = (
                id
                for (owner, id), session in self._sessions.items()
                if owner == tenant and id > after and (session.busy or not session.expired(now))
            )
            page = heapq.nsmallest(page_size + 1, ids)
            infos = [self._sessions[tenant, id].info() for id in page[:page_size]]
        return infos, page[page_size - 1] if len(page) > page_size else ""

    def one_shot(self, tenant: str, policy: str | None) -> Session:
        """A session without a name for a single request; it is in no table and vanishes with its turn.

        Raises:
            InvalidField: as in `create`.
        """
        chosen, layout = self._layout(policy)
        return Session(id="", tenant=tenant, policy=chosen, layout=layout, busy=True)

    def begin_turn(
        self, tenant: str, id: str, abandoned: Callable[[], bool] = lambda: False, *, wait: bool = False
    ) -> Future[Session]:
        """Have the session's next turn: at once where none is in flight.

        Args:
            tenant: who asks.
            id: which session.
            abandoned: tells whether the reader of this turn has gone, and it will be rolled back.
            wait: stand in line behind the turn in flight. One that is abandoned is waited for in any case.

        Returns:
            Done when the turn is the caller's, who has to call `end_turn` then. Cancel it to leave the line.
            A session that is deleted or expires meanwhile is SessionNotFound there.

        Raises:
            SessionNotFound: unknown, expired or another tenant's.
            SessionBusy: another turn is in flight.
        """
        held: Future[Session] = Future()
        with self._lock:
            session = self._find(tenant, id)
            if session.busy:
                ahead = [session.abandoned, *(waiter.abandoned for waiter in session.line)]
                if not wait and not all(abandoned() for abandoned in ahead):
                    raise _busy(id)
                session.line.append(Waiter(held, abandoned))
                return held
            session.busy, session.abandoned = True, abandoned
        held.set_result(session)
        return held

    def begin_unheard(self, session: Session) -> bool:
        """Have a session's turn, without a reader: others wait for its end. False if one is in flight, or
        there is nothing to do: it has its cache, or no turns."""
        with self._lock:
            if session.busy or session.deleted or session.cache is not None or not session.turns:
                return False
            session.busy, session.abandoned = True, lambda: True
            return True

    def latest(self) -> Sequence[Session]:
        """All sessions, those used last first."""
        with self._lock:
            return sorted(self._sessions.values(), key=lambda session: session.update_time, reverse=True)

    def answer(self, tenant: str, id: str, request_id: str) -> Answer | None:
        """The answer of the committed turn that a request id names.

        Raises:
            SessionNotFound: unknown, expired or another tenant's.
        """
        with self._lock:
            session = self._find(tenant, id)
            end = len(session.transcript)
            for record in reversed(session.turns):
                if record.request_id == request_id:
                    return Answer(
                        session, record, session.transcript[end - record.completion_tokens : end].tolist()
                    )
                end -= record.tokens
        return None

    def end_turn(
        self, session: Session, tokens: Sequence[int] = (), record: TurnRecord | None = None
    ) -> None:
        """The turn is over: `record` and the tokens that it appended if it committed, None if it did not."""
        with self._lock:
            if record is not None:
                session.transcript.extend(tokens)
                session.turns.append(record)
                session.rebuild = None
                session.touch()
            self._next_expiry = min(self._next_expiry, session.expire_time)
            over = session.deleted or session.expired(time.time())
            heir = None if over else _first(session)
            session.busy = heir is not None
        if record is not None:
            self.changed(session)
        if heir is not None:
            heir.set_result(session)
        elif over:
            _dismiss(session, SessionNotFound(resource_name(session.id)))

    def dismiss(self, error: ApiaryError) -> None:
        """Send away whoever stands in line for a turn."""
        with self._lock:
            sessions = [session for session in self._sessions.values() if session.line]
        for session in sessions:
            _dismiss(session, error)

    def update(self, tenant: str, id: str, change: SessionChange) -> Session:
        """Change a session's labels and when it ends.

        Raises:
            SessionNotFound: unknown, expired or another tenant's.
        """
        now = time.time()
        with self._lock:
            session = self._find(tenant, id)
            if change.labels is not None:
                session.labels = dict(change.labels)
            if change.expire_time is not None:
                session.ttl, session.expire_time = None, change.expire_time
            elif change.ttl is not None:
                session.ttl, session.expire_time = change.ttl, now + change.ttl
            self._next_expiry = min(self._next_expiry, session.expire_time)
        self.changed(session)
        return session

    def rewind(self, session: Session, turns: int) -> None:
        """Take the turns of a session back but for its first ones; the caller has its turn, and sees to the
        cache. A lifetime that counts from the last turn begins anew."""
        with self._lock:
            gone = sum(turn.tokens for turn in session.turns[turns:])
            del session.turns[turns:], session.transcript[len(session.transcript) - gone :]
            session.stored = min(session.stored, turns)
            session.epoch += 1
            session.touch()
        self.changed(session)

    def let_go(self, session: Session, *, held: bool = False) -> bool:
        """Leave a session without its cache; False if it has a turn, unless the caller has that (`held`). The
        memory is the caller's to free."""
        with self._lock:
            if (session.busy and not held) or session.deleted:
                return False
            session.cache = None
            session.rebuild = session.rebuild or RebuildReason.SNAPSHOT_EVICTED  # unless that can be read
            return True

    def fitting(self, session: Session, policy: str | None) -> tuple[Policy, SlotLayout]:
        """A policy (None: the default) that a session may change to, and its slots.

        Raises:
            InvalidField: it is malformed, or larger than this worker can hold, or pins what opens a session
                that has begun.
            ContextFull: it evicts nothing and does not hold the transcript.
        """
        chosen, layout = self._layout(policy)
        if session.turns and chosen.pinned == "system":
            why = "pinned=system is found out by a session's first turn: say how many tokens, as pinned=40"
            raise InvalidField([("policy", why)])
        tokens = len(session.transcript)
        if not chosen.evicts and tokens > chosen.bound:
            raise ContextFull(
                f"the session has {tokens} tokens and {chosen} holds at most {chosen.bound}: "
                "choose a larger bound, or a policy that evicts, like buzz",
                cached=0,
                prompt=tokens,
                bound=chosen.bound,
            )
        return chosen, layout

    def remove(self, tenant: str, id: str) -> Session:
        """Take a session out of the table; its memory is the caller's to free.

        Raises:
            SessionNotFound: unknown, expired or another tenant's.
        """
        with self._lock:
            session = self._find(tenant, id)
            session.deleted = True
            del self._sessions[tenant, id]
        self.changed(session)
        _dismiss(session, SessionNotFound(resource_name(id)))
        return session

    def remove_expired(self) -> Sequence[Session]:
        """Take all idle expired sessions out of the table; their memory is the caller's to free."""
        now = time.time()
        with self._lock:
            if now < self._next_expiry:
                return []
            over = [
                key for key, session in self._sessions.items() if session.expired(now) and not session.busy
            ]
            for key in over:
                self._sessions[key].deleted = True
            removed = [self._sessions.pop(key) for key in over]
            idle = (session for session in self._sessions.values() if not session.busy)
            self._next_expiry = min((session.expire_time for session in idle), default=float("inf"))
        for session in removed:
            self.changed(session)
        return removed

    def _add(self, session: Session) -> None:
        known = self._sessions.get((session.tenant, session.id))
        if known is not None and (known.busy or not known.expired(time.time())):
            raise SessionExists(resource_name(session.id))
        if known is not None:
            raise SessionBusy(f"{resource_name(session.id)} has expired and is being removed; try again")
        if len(self._sessions) >= self._limit:
            raise BudgetExhausted(f"all {self._limit} places for sessions are taken", retry_after=5.0)
        self._sessions[session.tenant, session.id] = session
        self._next_expiry = min(self._next_expiry, session.expire_time)

    def _find(self, tenant: str, id: str) -> Session:
        session = self._sessions.get((tenant, id))
        if session is None or (session.expired(time.time()) and not session.busy):
            raise SessionNotFound(resource_name(id))
        return session


def _busy(id: str) -> SessionBusy:
    return SessionBusy(f"{resource_name(id)} has a turn in flight; wait for it or cancel it")


def _first(session: Session) -> Future[Session] | None:
    """Whose turn is next."""
    while session.line:
        waiter = session.line.pop(0)
        if waiter.held.set_running_or_notify_cancel():
            session.abandoned = waiter.abandoned
            return waiter.held
    return None


def _dismiss(session: Session, error: ApiaryError) -> None:
    while (held := _first(session)) is not None:
        held.set_exception(error)
