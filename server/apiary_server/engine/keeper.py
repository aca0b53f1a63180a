"""What is done to sessions between their turns: on the engine thread, since it moves their memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future

from apiary_server import errors
from apiary_server.engine.loop import Loop
from apiary_server.sessions.info import RebuildReason, SessionInfo
from apiary_server.sessions.manager import SessionManager, resource_name
from apiary_server.sessions.request import SessionChange
from apiary_server.sessions.residency import Residency
from apiary_server.sessions.session import Session


class Keeper:
    """Copies, changes and deletes sessions. All methods may be called from any thread and wait for nothing;
    what they return is done when the session is as it says.

    A session whose turn is in flight is SessionBusy, but for what says otherwise; where that turn was
    abandoned, its end is waited for.

    Args:
        sessions: the table of sessions.
        residency: their memory.
        loop: what the engine thread does.
    """

    def __init__(self, sessions: SessionManager, residency: Residency, loop: Loop) -> None:
        self._sessions = sessions
        self._residency = residency
        self._loop = loop

    def fork(self, tenant: str, id: str, new: str | None) -> Future[SessionInfo]:
        """Copy what a session has committed into a new one, which goes its own way from there.

        Args:
            tenant: whose sessions they are.
            id: of the session.
            new: the id of the new one; None draws one.

        Returns:
            The new session; or SessionExists, or BudgetExhausted.

        Raises:
            SessionNotFound: unknown, expired or another tenant's.
            SessionBusy: a turn is in flight.
        """
        return self._between_turns(tenant, id, lambda session: self._fork(session, new))

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
            return self._between_turns(tenant, id, lambda session: self._update(session, change))
        session, info = self._sessions.update(tenant, id, change)
        done: Future[SessionInfo] = Future()
        self._loop.when_stored(session, lambda _: done.set_result(info))
        return done

    def rewind(self, tenant: str, id: str, turns: int) -> Future[SessionInfo]:
        """Take a session's last turns back: its first `turns` stay. The next turn computes its cache anew.

        Returns:
            The session; or InvalidField, if it has fewer turns.

        Raises:
            SessionNotFound: unknown, expired or another tenant's.
            SessionBusy: a turn is in flight.
        """
        return self._between_turns(tenant, id, lambda session: self._rewind(session, turns))

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

        self._loop.post(forget)
        return done

    def _between_turns(self, tenant: str, id: str, work: Callable[[Session], Session]) -> Future[SessionInfo]:
        """Have a session's turn for some work on the engine thread. Returns what is known then of the session
        that the work returns."""
        held = self._sessions.begin_turn(tenant, id)
        done: Future[SessionInfo] = Future()

        def run() -> None:
            try:
                session = held.result()
                try:
                    if session.deleted:
                        raise errors.SessionNotFound(resource_name(session.id))
                    outcome = work(session)
                finally:
                    self._sessions.end_turn(session)
                info = outcome.info()
                self._loop.when_stored(outcome, lambda _: done.set_result(info))
            except BaseException as error:
                done.set_exception(error)

        held.add_done_callback(lambda _: self._loop.post(run))
        return done

    def _fork(self, session: Session, new: str | None) -> Session:
        twin = self._sessions.fork(session, new)
        try:
            if not self._residency.copy(session, twin):
                raise self._residency.exhausted(twin.layout)
        except BaseException:
            with contextlib.suppress(errors.SessionNotFound):
                self._sessions.remove(twin.tenant, twin.id)
            raise
        finally:
            self._sessions.end_turn(twin)
        return twin

    def _update(self, session: Session, change: SessionChange) -> Session:
        policy, layout = self._sessions.fitting(session, change.policy)
        self._sessions.update(session.tenant, session.id, change)
        if policy != session.policy:
            self._residency.free(session)
            session.policy, session.layout = policy, layout
            session.rebuild = RebuildReason.POLICY_CHANGED if session.turns else None
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
