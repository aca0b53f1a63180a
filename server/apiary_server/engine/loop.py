"""One step of the engine: take commands, end what is over, schedule, run; and meanwhile hand out what the
step before made."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Callable
from typing import TypeVar

import structlog

from apiary_server import errors
from apiary_server.engine.delivery import Delivery, TokenStream, deliver
from apiary_server.engine.mailbox import Mailbox
from apiary_server.engine.request import TurnRequest
from apiary_server.engine.result import Delta, Observer, StepStats
from apiary_server.engine.scheduler import Scheduler
from apiary_server.engine.step import ScheduledChunk, StepPlan
from apiary_server.engine.turn import Turn
from apiary_server.model.runner import Piece, Runner
from apiary_server.model.sampler import Sampled, sample
from apiary_server.sessions.journal import Journal
from apiary_server.sessions.manager import SessionManager, resource_name
from apiary_server.sessions.residency import Residency
from apiary_server.sessions.session import Session

_Stats = TypeVar("_Stats")
_log = structlog.get_logger(__name__)
_IDLE_WAIT = 0.5  # seconds between looks at expired sessions when there is no turn
_LAST_STEPS = 2.0  # seconds for what is kept of answers when the worker shuts down
_SHUT_DOWN = "the worker is shutting down"
_PAUSED_WAIT = 0.005  # seconds between looks at readers and memory when all turns wait


class Loop:
    """What the engine thread does, again and again. For that thread, but for what says otherwise.

    Args:
        mailbox: what it is asked for.
        runner: the forward pass.
        scheduler: what runs next.
        sessions: the table of sessions.
        residency: their memory.
        observer: receives plain numbers.
        reattach_grace: seconds that a turn with a request id goes on without a reader.
        journal: what stores sessions; None: nothing does.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        runner: Runner,
        scheduler: Scheduler,
        sessions: SessionManager,
        residency: Residency,
        observer: Observer,
        reattach_grace: float,
        journal: Journal | None = None,
    ) -> None:
        self.runner = runner
        self.residency = residency
        self.step_began: float | None = None
        self._mailbox = mailbox
        self._scheduler = scheduler
        self._sessions = sessions
        self._observer = observer
        self._reattach_grace = reattach_grace
        self._journal = journal
        self._delivery = Delivery()
        self._after_flush: list[Callable[[], None]] = []
        self._idle = True  # the step before had nothing to run

    def add(self, turn: Turn) -> None:
        """Queue a turn, and end the one that has to leave for it if the queue is full."""
        leaving = self._scheduler.add(turn)
        if self._mailbox.closed:  # it was on its way to the queue when the engine thread ended
            self._cut_short(turn, errors.Draining, _SHUT_DOWN)
            self._hand_over()
        elif leaving is not None:
            self._fail(*leaving)

    def end_all(self) -> None:
        """End every turn, since the worker is shutting down: rolled back, or with what its reader took."""
        for turn in self._scheduler.turns():
            if turn.cut is None:
                self._cut_short(turn, errors.Draining, _SHUT_DOWN)
        end = time.monotonic() + _LAST_STEPS
        while any(turn.cut for turn in self._scheduler.turns()) and time.monotonic() < end:
            self.step()
        for turn in self._scheduler.turns():
            self._fail(turn, errors.Draining(f"{_SHUT_DOWN}; the turn was rolled back"))
        self._hand_over()

    def attach(
        self, turn: Turn, request: TurnRequest, stream: TokenStream, again: Callable[[list[int]], Delta]
    ) -> bool:
        """Have a turn in flight go on for the same request that came again; False if it has ended.

        Args:
            turn: it.
            request: as it came now.
            stream: where the answer goes on.
            again: makes a delta, for that request, of the answer so far; what it raises changes nothing.
        """
        if turn.cut is not None or turn not in self._scheduler.turns():
            return False
        missed = again(turn.tokens[turn.prompt_end :][: turn.delivered])
        turn.stream.close()
        self._delivery.send(turn.stream, errors.Cancelled("the same request came again, by another call"))
        turn.attach(request, stream)
        if missed.token_ids:
            self._delivery.send(stream, missed)
        return True

    def free(self, session: Session) -> None:
        """Give back the memory of a session that was taken out of the table, and end its turn."""
        self._end_lost_turns()
        self.residency.free(session)

    def step(self) -> None:
        """One turn of the loop: take commands, end what is over, schedule, run, hand out what came of it, or
        leave that to the next turn."""
        if not self._mailbox.empty:
            self._hand_over()  # what was asked for may take its time
        wait = _PAUSED_WAIT if self._scheduler.turns() else _IDLE_WAIT
        self._mailbox.obey(wait if self._idle else 0)
        self._end_lost_turns()
        for session in self._sessions.remove_expired():
            self.residency.free(session)
        plan = self._scheduler.schedule()
        self._idle = not plan.chunks
        if plan.chunks:
            self.step_began = time.monotonic()
            self._execute(plan)
            self.step_began = None
        else:
            self._make_room(plan)
        if not self._scheduler.turns():
            self.residency.check_integrity()
        if self._idle or not self._scheduler.turns():
            self._hand_over()  # else while the next step computes, which begins at once

    def _hand_over(self) -> None:
        """What steps made goes to its readers; what waits for the store comes after that."""
        self._delivery.flush()
        after, self._after_flush = self._after_flush, []
        for command in after:
            command()
        if self._journal is not None:
            self._journal.give_up()

    def _end_lost_turns(self) -> None:
        """End the turns that nobody waits for any more."""
        now = time.monotonic()
        for turn in self._scheduler.turns():
            deadline = turn.request.deadline
            if turn.session.deleted:
                self._fail(turn, errors.Cancelled(f"{resource_name(turn.session.id)} was deleted"))
            elif turn.cut is not None:
                pass  # what its reader took is being kept
            elif turn.stream.closed and self._awaits_reader(turn, now):
                pass
            elif turn.stream.closed:
                self._cut_short(turn, errors.Cancelled, "cancelled by the caller")
            elif deadline is not None and now >= deadline:
                where = "in queue" if turn.started is None else "in flight"
                self._cut_short(turn, errors.DeadlineExceeded, f"the deadline passed {where}")
            elif turn.stream.stalled(now):
                self._cut_short(turn, errors.ReaderStalled, "the reader took nothing for too long")
            elif turn.started is None:
                try:
                    self._scheduler.check_waiting(turn)
                except errors.DeadlineExceeded as error:
                    self._fail(turn, error)

    def _make_room(self, plan: StepPlan) -> None:
        """If every turn waits for memory, nobody will give any back: have the session of one that has not
        started leave it to them, the last in line first; if that cannot be, end one of them."""
        running = self._scheduler.running
        turn = running[-1] if running else plan.blocked
        if turn is None or not all(other.starved for other in running):
            return
        others = [other.session for other in reversed(self._scheduler.line()) if other is not turn]
        if not self.residency.make_room(others):
            self._fail(turn, self.residency.exhausted(turn.session.layout))

    def _execute(self, plan: StepPlan) -> None:
        began = time.monotonic()
        try:
            sampled = self._forward(plan)
        except Exception:
            error = self._incident("a step failed")
            for chunk in plan.chunks:
                self._fail(chunk.turn, error)
            return
        compactions = evicted = 0
        for chunk in plan.chunks:
            turn = chunk.turn
            before = turn.evicted
            try:
                self._advance(chunk, sampled.get(id(turn)))
            except Exception:
                self._fail(turn, self._incident("a turn failed"))
            compactions += turn.evicted > before
            evicted += turn.evicted - before
        seconds = time.monotonic() - began
        self._scheduler.observe(plan, seconds)
        self._observe(plan, seconds, compactions, evicted)

    def _forward(self, plan: StepPlan) -> dict[int, Sampled]:
        pieces = [
            Piece(
                chunk.turn.tokens[chunk.turn.computed : chunk.turn.computed + chunk.count],
                chunk.turn.transaction.cache,
                chunk.turn.transaction.place,
                chunk.samples,
            )
            for chunk in plan.chunks
        ]
        logits = self.runner.run(pieces, self._hand_over)
        turns = [chunk.turn for chunk in plan.chunks if chunk.samples]
        if not turns:
            return {}
        choices = [turn.choice() for turn in turns]
        return {id(turn): result for turn, result in zip(turns, sample(logits, choices), strict=True)}

    def _advance(self, chunk: ScheduledChunk, sampled: Sampled | None) -> None:
        """Count a chunk as computed, compact at its segment's end, and take the new token."""
        turn = chunk.turn
        turn.computed += chunk.count
        if turn.computed == turn.segment_end:
            turn.evicted += turn.transaction.end_segment()
        if sampled is not None:
            self._take_token(turn, sampled)
        elif turn.replaying and not turn.remaining:
            self._commit(turn, Delta(index=turn.delivered))

    def _take_token(self, turn: Turn, sampled: Sampled) -> None:
        delta = turn.take(sampled)
        if turn.finish_reason is None or turn.forgets:
            if delta.text or delta.token_ids:
                self._delivery.send(turn.stream, delta)
            if turn.forgets:
                turn.start_replay()
        else:
            self._commit(turn, delta)

    def _awaits_reader(self, turn: Turn, now: float) -> bool:
        """Whether a turn goes on without its reader: the same request may come again, for a while and unless
        another turn of the session waits."""
        if turn.request.request_id is None or turn.session.line:
            return False
        turn.detached = turn.detached or now
        return now - turn.detached < self._reattach_grace

    def _cut_short(self, turn: Turn, kind: type[errors.ApiaryError], why: str) -> None:
        """End a turn before its time: as if it had never been, or with the answer that its reader took."""
        taken = turn.read_before + turn.stream.seal() if turn.request.keep else 0
        if not taken:
            self._fail(turn, kind(f"{why}; the turn was rolled back"))
            return
        turn.keep(taken, kind(f"{why}; what was delivered is kept"))
        if not turn.remaining:
            self._commit(turn, Delta(index=taken))

    def _commit(self, turn: Turn, last: Delta) -> None:
        turn.transaction.commit()
        self._scheduler.remove(turn)  # before: the same request finds the turn, or what came of it
        self._sessions.end_turn(turn.session, turn.tokens[turn.carried :], turn.record())
        now = time.monotonic()
        last.finish_reason, last.usage = turn.finish_reason, turn.usage(now)
        self._send_last(turn, last)
        outcome = turn.finish_reason.value if turn.finish_reason is not None else ""
        self._notify(self._observer.turn, turn.stats(now, outcome))

    def _send_last(self, turn: Turn, last: Delta) -> None:
        """Say that a turn is committed, once it is stored; what it answered need not wait for that."""
        session, stream, usage = turn.session, turn.stream, last.usage
        if self._journal is None or not session.id or usage is None or turn.cut is not None:
            self._delivery.send(stream, turn.cut or last)
            return
        end = Delta(index=last.index + len(last.token_ids), finish_reason=last.finish_reason, usage=usage)
        last.finish_reason = last.usage = None
        if last.text or last.token_ids:
            self._delivery.send(stream, last)
        self._after_flush.append(lambda: self.deliver_stored(session, stream, end))

    def deliver_stored(self, session: Session, stream: TokenStream, end: Delta) -> None:
        """Hand over the end of an answer when its session is stored, or is not. From any thread."""

        def tell(durable: bool) -> None:
            if end.usage is not None:
                end.usage = dataclasses.replace(end.usage, durable=durable)
            deliver(stream, end)

        self.when_stored(session, tell)

    def when_stored(self, session: Session, then: Callable[[bool], None]) -> None:
        """Have something done when a session is stored as it is now: with True, or with False where it is
        not. From any thread, in whichever."""
        if self._journal is None:
            then(False)
        else:
            self._journal.when_stored(session, then)

    def _fail(self, turn: Turn, error: errors.ApiaryError) -> None:
        """End a turn as if it had never been."""
        turn.transaction.rollback()
        self._sessions.end_turn(turn.session)
        self._scheduler.remove(turn)
        self._delivery.send(turn.stream, error)
        self._notify(self._observer.turn, turn.stats(time.monotonic(), type(error).__name__))

    def _notify(self, observe: Callable[[_Stats], None], stats: _Stats) -> None:
        try:
            observe(stats)
        except Exception:  # telemetry must never cost a turn
            _log.exception("an observer failed")

    def _incident(self, event: str) -> errors.Internal:
        """Log the exception that is being handled, whole, and give it a name that the caller may quote."""
        incident = secrets.token_hex(6)
        _log.exception(event, incident=incident)
        return errors.Internal(incident)

    def _observe(self, plan: StepPlan, duration: float, compactions: int, evicted: int) -> None:
        self._notify(
            self._observer.step,
            StepStats(
                duration=duration,
                prefill_tokens=plan.prefill_tokens,
                decode_tokens=plan.decode_tokens,
                compactions=compactions,
                evicted_entries=evicted,
                running_turns=len(self._scheduler.running),
                queued_turns=len(self._scheduler.waiting),
                used_bytes=self.residency.pool.used_bytes,
                parked_bytes=self.residency.parked_bytes,
                resident_sessions=self.residency.resident_sessions,
                sessions=len(self._sessions),
            ),
        )
