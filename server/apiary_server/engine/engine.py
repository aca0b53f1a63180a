"""The engine: one thread runs torch in a loop; everyone else talks to it through here."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import structlog
import torch

from apiary_server import errors
from apiary_server.engine.delivery import Delivery, TokenStream
from apiary_server.engine.door import Door
from apiary_server.engine.loop import Loop
from apiary_server.engine.places import Place, Places
from apiary_server.engine.request import Messages, Text, TurnRequest
from apiary_server.engine.result import Capacity, ModelInfo
from apiary_server.engine.scheduler import Scheduler
from apiary_server.engine.turn import Turn
from apiary_server.sessions.info import SessionInfo
from apiary_server.sessions.manager import SessionManager
from apiary_server.sessions.request import SessionChange
from apiary_server.sessions.session import Answer, Session

_log = structlog.get_logger(__name__)


class Engine:
    """Runs turns. All methods may be called from any thread.

    Args:
        model: the served model and its limits.
        door: turns requests into turns, or refuses them.
        scheduler: which turns may wait.
        loop: what the engine thread does.
        sessions: the table of sessions.
        step_limit: seconds after which a step hangs.

    Attributes:
        healthy: False once the loop hung or broke; the process should end.
        on_unhealthy: called when that happens.
    """

    def __init__(
        self,
        model: ModelInfo,
        door: Door,
        scheduler: Scheduler,
        loop: Loop,
        sessions: SessionManager,
        step_limit: float,
    ) -> None:
        self.model = model
        self.sessions = sessions
        self.healthy = True
        self.on_unhealthy: Callable[[], None] | None = None
        self._door = door
        self._scheduler = scheduler
        self._loop = loop
        self._step_limit = step_limit
        self._places = Places()
        self._draining = False
        self._admission = ThreadPoolExecutor(1, "admission")  # of turns that had to wait for their session
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Start the loop and its watchdog."""
        self._thread.start()
        self._watchdog.start()

    def drain(self) -> None:
        """Take no new turns; those in flight go on."""
        self._draining = True
        self.sessions.dismiss(_draining())

    def stop(self, grace: float) -> None:
        """Let turns finish for `grace` seconds, roll the others back, and end the loop."""
        self.drain()
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline and self._thread.is_alive() and self._busy:
            time.sleep(0.02)
        self._stopping.set()
        self._loop.post(lambda: None)
        self._thread.join(timeout=self._step_limit)
        self._admission.shutdown(wait=False, cancel_futures=True)

    def reserve(self, tenant: str) -> Place:
        """Take a place in the queue for a turn of a tenant. Waits for nothing, whatever the engine does.

        Raises:
            Draining: the worker is shutting down.
            QueueFull: too many turns wait.
        """
        if self._draining:
            raise _draining()
        return self._places.take(tenant, self._scheduler.check_queue)

    def open(self, request: TurnRequest, stream: TokenStream, place: Place | None = None) -> Future[None]:
        """Check a request and queue its turn; the answer comes by `stream`. Blocks while it tokenises, not
        while another turn of the session is in flight.

        Args:
            request: what is asked.
            stream: where the answer goes.
            place: reserved for it, and released here; None takes one now.

        Returns:
            Done when the turn is queued, which is now unless another one of its session is in flight. What
            would be raised after that is raised there, and Cancelled if the reader leaves meanwhile.

        Raises:
            Draining, QueueFull: see `reserve`.
            InvalidField, SessionNotFound, SessionBusy, ContextFull, DeadlineExceeded: see `Door`.
        """
        place = place or self.reserve(request.tenant)
        queued: Future[None] = Future()
        with _given_back(place):
            self._open(request, stream, place, queued)
        return queued

    def tokenize(self, input: Text | Messages) -> list[int]:
        """Token ids of text, or of messages as a first turn."""
        return self._door.tokenizer.encode(input)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of token ids. Raises InvalidField if one is not in the vocabulary."""
        return self._door.tokenizer.decode(ids)

    def fork_session(self, tenant: str, id: str, new: str | None) -> Future[SessionInfo]:
        """Copy what a session has committed into a new one, which goes its own way from there.

        Args:
            tenant: whose sessions they are.
            id: of the session.
            new: the id of the new one; None draws one.

        Returns:
            The new session, when its cache is there. BudgetExhausted is raised there.

        Raises:
            SessionNotFound, SessionBusy, SessionExists, BudgetExhausted: see `SessionManager`.
        """
        session = self.sessions.begin_turn(tenant, id).result()
        try:
            twin = self.sessions.fork(session, new)
        except BaseException:
            self.sessions.end_turn(session)
            raise
        done: Future[SessionInfo] = Future()
        self._loop.post(lambda: self._copy(session, twin, done))
        return done

    def update_session(self, tenant: str, id: str, change: SessionChange) -> Future[SessionInfo]:
        """Change a session's settings. With another policy the next turn computes its cache anew.

        Returns:
            The session as it is then.

        Raises:
            SessionNotFound: unknown, expired or another tenant's.
            InvalidField, ContextFull: this worker cannot serve the policy; it does not hold the transcript.
            SessionBusy: another policy cannot be had while a turn is in flight.
        """
        done: Future[SessionInfo] = Future()
        if change.policy is None:
            done.set_result(self.sessions.update(tenant, id, change))
            return done
        session = self.sessions.begin_turn(tenant, id).result()
        try:
            policy, layout = self.sessions.fitting(session, change.policy)
            self.sessions.update(tenant, id, change)
        except BaseException:
            self.sessions.end_turn(session)
            raise

        def set_policy() -> None:
            self._loop.set_policy(session, policy, layout)
            done.set_result(session.info())

        self._loop.post(set_policy)
        return done

    def rewind_session(self, tenant: str, id: str, turns: int) -> Future[SessionInfo]:
        """Take a session's last turns back: its first `turns` stay. The next turn computes its cache anew.

        Returns:
            The session as it is then.

        Raises:
            SessionNotFound: unknown, expired or another tenant's.
            SessionBusy: a turn is in flight.
            InvalidField: it has fewer turns.
        """
        session = self.sessions.begin_turn(tenant, id).result()
        if turns > len(session.turns):
            self.sessions.end_turn(session)
            raise errors.InvalidField(
                [("turn_count", f"is {turns}, and {len(session.turns)} turns are there")]
            )
        done: Future[SessionInfo] = Future()

        def rewind() -> None:
            self._loop.rewind(session, turns)
            done.set_result(session.info())

        self._loop.post(rewind)
        return done

    def delete_session(self, tenant: str, id: str) -> Future[None]:
        """Take a session away, and its running turn with it; done when its memory is free.

        Raises:
            SessionNotFound: at once.
        """
        session = self.sessions.remove(tenant, id)
        done: Future[None] = Future()

        def forget() -> None:
            self._loop.free(session)
            done.set_result(None)

        self._loop.post(forget)
        return done

    def capacity(self) -> Capacity:
        """Budgets and what is in use."""
        residency = self._loop.residency
        pool = residency.pool
        return Capacity(
            budget_bytes=pool.budget,
            used_bytes=pool.used_bytes,
            peak_bytes=pool.peak_bytes,
            workspace_bytes=pool.workspace_bytes,
            workspaces=pool.workspaces,
            slot_bytes=pool.default.bytes,
            reserve_slots=residency.reserve,
            max_resident_sessions=pool.places(pool.default) - residency.reserve,
            resident_sessions=residency.resident_sessions,
            parked_sessions=residency.parked_sessions,
            parked_bytes=residency.parked_bytes,
            parked_budget_bytes=residency.parked_budget,
            sessions=len(self.sessions),
            running_turns=len(self._scheduler.running),
            queued_turns=len(self._scheduler.waiting) + len(self._places),
            queue_limit=self._scheduler.queue_limit,
        )

    @property
    def _busy(self) -> bool:
        return bool(self._places or self._scheduler.waiting or self._scheduler.running)

    def _open(self, request: TurnRequest, stream: TokenStream, place: Place, queued: Future[None]) -> None:
        earlier = self._door.earlier(request)
        if isinstance(earlier, Turn):
            self._loop.post(lambda: self._attach(earlier, request, stream, place, queued))
        elif earlier is not None:
            self._replay(earlier, request, stream, place, queued)
        else:
            held = self._door.knock(request, stream)
            if held.done():
                self._queue(request, stream, place, held, queued)
            else:
                held.add_done_callback(
                    lambda _: self._later(
                        place, queued, lambda: self._queue(request, stream, place, held, queued)
                    )
                )
                stream.on_close(held.cancel)

    def _queue(
        self,
        request: TurnRequest,
        stream: TokenStream,
        place: Place,
        held: Future[Session],
        queued: Future[None],
    ) -> None:
        """Queue a turn that has its session, unless the same request was before it in line."""
        if held.cancelled():
            raise errors.Cancelled("cancelled by the caller")
        session, earlier = held.result(), self._door.earlier(request)
        if isinstance(earlier, Answer):
            self.sessions.end_turn(session)
            self._replay(earlier, request, stream, place, queued)
            return
        turn = self._door.admit(request, stream, session)
        self._loop.post(lambda: self._arrive(turn, place))
        queued.set_result(None)

    def _replay(
        self, answer: Answer, request: TurnRequest, stream: TokenStream, place: Place, queued: Future[None]
    ) -> None:
        delivery = Delivery()
        delivery.send(stream, self._door.replay(request, answer))
        delivery.flush()
        place.release()
        queued.set_result(None)

    def _later(self, place: Place, queued: Future[None], work: Callable[[], None]) -> None:
        """Go on, in a thread of its own, with the opening of a turn that had to wait."""

        def go_on() -> None:
            try:
                with _given_back(place):
                    work()
            except BaseException as error:
                queued.set_exception(error)

        self._admission.submit(go_on)

    # the engine thread

    def _run(self) -> None:
        with torch.inference_mode():
            try:
                while not self._stopping.is_set():
                    self._loop.step()
                self._loop.end_all(
                    errors.Draining("the worker is shutting down and rolled the turn back; ask another", 1.0)
                )
            except Exception:
                _log.exception("the engine loop broke")
                self._lose_health()

    def _attach(
        self, turn: Turn, request: TurnRequest, stream: TokenStream, place: Place, queued: Future[None]
    ) -> None:
        if self._loop.attach(turn, request, stream, lambda tokens: self._door.again(request, tokens)):
            place.release()
            queued.set_result(None)
        else:  # it has ended meanwhile
            self._later(place, queued, lambda: self._open(request, stream, place, queued))

    def _copy(self, session: Session, twin: Session, done: Future[SessionInfo]) -> None:
        try:
            self._loop.copy(session, twin)
        except Exception as error:
            done.set_exception(error)
        else:
            done.set_result(twin.info())

    def _arrive(self, turn: Turn, place: Place) -> None:
        self._loop.add(turn)
        place.release()  # after: for an instant it counts twice, never not at all

    # the watchdog thread

    def _watch(self) -> None:
        limit = self._step_limit
        while self.healthy and not self._stopping.wait(min(1.0, limit / 4)):
            began = self._loop.step_began
            if began is not None and time.monotonic() - began > limit:
                _log.critical("a step hangs", seconds=round(time.monotonic() - began, 1))
                self._lose_health()

    def _lose_health(self) -> None:
        self.healthy = False
        if self.on_unhealthy is not None:
            self.on_unhealthy()


def _draining() -> errors.Draining:
    return errors.Draining("the worker is shutting down; try another", retry_after=1.0)


@contextlib.contextmanager
def _given_back(place: Place) -> Iterator[None]:
    """Release a place if what is done for it fails."""
    try:
        yield
    except BaseException:
        place.release()
        raise
