"""What is done to sessions between their turns: on the engine thread, since it moves their memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

from apiary_server import errors
from apiary_server.engine.cache_map import CacheCopy, copy_of
from apiary_server.engine.loop import Loop
from apiary_server.engine.mailbox import Mailbox
from apiary_server.engine.restorer import Restorer
from apiary_server.sessions.archive import Archive
from apiary_server.sessions.info import RebuildReason, SessionInfo, State
from apiary_server.sessions.manager import SessionManager, resource_name
from apiary_server.sessions.request import SessionChange
from apiary_server.sessions.residency import Residency
from apiary_server.sessions.session import Session
from apiary_server.sessions.snapshot import Image, without_cache
from apiary_server.sessions.store import StoredSession
from apiary_server.sessions.stored import stored_of

_Outcome = TypeVar("_Outcome")

_PATIENCE = 5.0  # seconds for which a fork waits for room
_LOOK = 0.02  # seconds between looks for it


class Keeper:
    """Creates, copies, changes and deletes sessions. All methods may be called from any thread and wait for
    nothing; what they return is done when the session is as it says.

    A session whose turn is in flight is SessionBusy, but for what says otherwise; where that turn was
    abandoned, its end is waited for.

    Args:
        sessions: the table of sessions.
        residency: their memory.
        mailbox: what the engine thread is asked for.
        loop: what it does.
        restorer: brings caches back that are stored.
        archive: what stores them; None: nothing does.
    """

    def __init__(
        self,
        sessions: SessionManager,
        residency: Residency,
        mailbox: Mailbox,
        loop: Loop,
        restorer: Restorer,
        archive: Archive | None = None,
    ) -> None:
        self._archive = archive
        self._restorer = restorer
        self._sessions = sessions
        self._residency = residency
        self._mailbox = mailbox
        self._loop = loop
        self._changing: set[Future[Any]] = set()

    @property
    def busy(self) -> bool:
        """Whether anybody waits for a change of a session, or a copy."""
        return bool(self._changing)

    def create(
        self,
        tenant: str,
        id: str | None,
        policy: str | None,
        expire_time: float | None,
        ttl: float | None,
        labels: Mapping[str, str],
    ) -> Future[SessionInfo]:
        """Add an empty session; see `SessionManager.create`, which raises what this does.

        Returns:
            The session, when it is stored.
        """
        session = self._sessions.create(tenant, id, policy, expire_time, ttl, labels)
        return self.stored(session)

    def fork(self, tenant: str, id: str, new: str | None) -> Future[SessionInfo]:
        """Copy what a session has committed into a new one, which goes its own way from there.

        Args:
            tenant: whose sessions they are.
            id: of the session.
            new: the id of the new one; None draws one.

        Returns:
            The new session; or SessionExists, or, where nothing is stored, BudgetExhausted.

        Raises:
            SessionNotFound: unknown, expired or another tenant's.
            SessionBusy: a turn is in flight.
        """
        until = time.monotonic() + _PATIENCE
        return self._change(tenant, id, lambda session: self._fork(session, new, until), cache=True)

    def update(self, tenant: str, id: str, change: SessionChange) -> Future[SessionInfo]:
        """Change a session's settings. With another policy the next turn computes its cache anew; but for
        that, settings change while a turn is in flight, too.

        Returns:
            The session; or InvalidField, if this worker cannot serve the policy, or ContextFull, if that does
            not hold the transcript.

        Raises:
            SessionNotFound: unknown, expired or another tenant's.
            SessionBusy: a turn is in flight.
        """
        if change.policy is not None:
            return self._change(tenant, id, lambda session: self._update(session, change))
        return self.stored(self._sessions.update(tenant, id, change))

    def rewind(self, tenant: str, id: str, turns: int) -> Future[SessionInfo]:
        """Take a session's last turns back: its first `turns` stay. The next turn computes its cache anew,
        but for what an earlier snapshot has.

        Returns:
            The session; or InvalidField, if it has fewer turns.

        Raises:
            SessionNotFound: unknown, expired or another tenant's.
            SessionBusy: a turn is in flight.
        """
        return self._change(tenant, id, lambda session: self._rewind(session, turns))

    def delete(self, tenant: str, id: str) -> Future[None]:
        """Take a session away, and its turn in flight with it; done when its memory is free.

        Raises:
            SessionNotFound: at once.
        """
        session = self._sessions.remove(tenant, id)
        done: Future[None] = Future()

        def forget() -> None:
            self._loop.free(session)
            self._loop.when_stored(session, lambda _: done.set_result(None))

        self._mailbox.post(forget)
        return done

    def copy(self, tenant: str, id: str) -> Future[tuple[StoredSession, Image]]:
        """Copy a session, to go elsewhere: what is to be known of it, and its cache, if it has one.

        Raises:
            SessionNotFound: unknown, expired or another tenant's.
            SessionBusy: a turn is in flight.
        """

        def copy(session: Session) -> tuple[StoredSession, Image]:
            memory = torch.empty(session.layout.bytes, dtype=torch.uint8)
            image = self._residency.image(session, memory) or without_cache(session)
            return stored_of(session), image

        return self._copied(tenant, id, copy)

    def look(self, tenant: str, id: str) -> Future[CacheCopy]:
        """Copy what a session's cache keeps. What is parked stays parked, and no turn has to wait; what is
        stored is brought, as for a turn.

        Returns:
            It; or SessionBusy, if a turn is in flight, or SessionNotFound, if it is gone by then.

        Raises:
            SessionNotFound: unknown, expired or another tenant's.
            SessionBusy: a turn of a session that is stored is in flight.
        """

        def copy(session: Session) -> CacheCopy:
            return copy_of(session, self._residency.look(session))

        if self._sessions.get(tenant, id).state is not State.STORED:
            return self._mailbox.call(lambda: copy(self._sessions.idle(tenant, id)))
        return self._copied(tenant, id, copy)

    def stored(self, session: Session) -> Future[SessionInfo]:
        """What is known of a session now, when it is stored, or cannot be."""
        done: Future[SessionInfo] = Future()
        info = session.info()
        self._loop.when_stored(session, lambda _: done.set_result(info))
        return done

    def _copied(self, tenant: str, id: str, copy: Callable[[Session], _Outcome]) -> Future[_Outcome]:
        """Copy something of a session between its turns, with its cache."""
        done: Future[_Outcome] = Future()

        def work(session: Session) -> Callable[[], None]:
            copied = copy(session)
            return lambda: done.set_result(copied)

        self._between_turns(tenant, id, work, done, cache=True)
        return done

    def _change(
        self, tenant: str, id: str, work: Callable[[Session], Session | None], *, cache: bool = False
    ) -> Future[SessionInfo]:
        """Change a session between its turns. Returns what is known after that of the session that the work
        returns, when that is stored; with None it is tried again soon."""
        done: Future[SessionInfo] = Future()

        def change(session: Session) -> Callable[[], None] | None:
            outcome = work(session)
            if outcome is None:
                return None
            return lambda: self.stored(outcome).add_done_callback(lambda info: done.set_result(info.result()))

        self._between_turns(tenant, id, change, done, cache=cache)
        return done

    def _between_turns(
        self,
        tenant: str,
        id: str,
        work: Callable[[Session], Callable[[], None] | None],
        done: Future[_Outcome],
        *,
        cache: bool,
    ) -> None:
        """Have a session's turn for some work on the engine thread. What the work returns is called when that
        turn is over; if that is None, the work is tried again soon. What it raises is set to `done`.

        With `cache`, which may be stored, it is brought before.
        """
        held = self._sessions.begin_turn(tenant, id)
        self._changing.add(done)
        done.add_done_callback(self._changing.discard)

        def run(brought: Future[None] | None) -> None:
            try:
                session = held.result()
                try:
                    if brought is not None:
                        brought.result()
                    if session.deleted:
                        raise errors.SessionNotFound(resource_name(session.id))
                    tell = work(session)
                except BaseException:
                    self._sessions.end_turn(session)
                    raise
                if tell is None:
                    threading.Timer(_LOOK, self._mailbox.post, [lambda: run(brought)]).start()
                    return
                self._sessions.end_turn(session)
                tell()
            except BaseException as error:
                done.set_exception(error)

        def begin(_: object) -> None:
            if not cache or held.exception() is not None:
                self._mailbox.post(lambda: run(None))
            else:
                brought = self._restorer.bring(held.result())
                brought.add_done_callback(lambda _: self._mailbox.post(lambda: run(brought)))

        held.add_done_callback(begin)

    def _fork(self, session: Session, new: str | None, until: float) -> Session | None:
        """Fork a session; None if there is no room, but may be soon."""
        lease = None
        if session.cache is not None:
            lease = self._residency.lease_beside(session)
            if lease is None and not self._residency.may_hand_over(session):
                if self._residency.may_have_room(session) and time.monotonic() < until:
                    return None
                if self._archive is None:
                    raise self._residency.exhausted(session.layout)
        try:
            twin = self._sessions.fork(session, new)
        except BaseException:
            if lease is not None:
                lease.release()
            raise
        try:
            if lease is not None:
                self._residency.copy(session, twin, lease)
            elif session.cache is not None and not self._residency.hand_over(session, twin):
                twin.rebuild = RebuildReason.SNAPSHOT_EVICTED
            if twin.cache is not None:
                self._sessions.changed(twin)
        finally:
            self._sessions.end_turn(twin)
        return twin

    def _update(self, session: Session, change: SessionChange) -> Session:
        policy, layout = self._sessions.fitting(session, change.policy)
        if policy != session.policy:
            self._residency.free(session)
            if self._archive is not None:
                self._archive.forget(session)
            session.policy, session.layout = policy, layout
            session.rebuild = RebuildReason.POLICY_CHANGED if session.turns else None
        self._sessions.update(session.tenant, session.id, change)  # after: what is stored has the policy
        return session

    def _rewind(self, session: Session, turns: int) -> Session:
        if turns > len(session.turns):
            why = f"is {turns}, and {len(session.turns)} turns are there"
            raise errors.InvalidField([("turn_count", why)])
        if turns < len(session.turns):
            self._residency.free(session)
            self._sessions.rewind(session, turns)
            session.rebuild = RebuildReason.REWOUND if turns else None
        return session
