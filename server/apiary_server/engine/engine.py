"""The loop: one thread runs torch. Commands come in by one queue; each step goes out in one hand-off."""

from __future__ import annotations

import contextlib
import queue
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import structlog
import torch

from apiary_server import errors
from apiary_server.engine.delivery import Delivery, TokenStream
from apiary_server.engine.door import Door
from apiary_server.engine.request import Messages, Text, TurnRequest
from apiary_server.engine.result import Capacity, Delta, FinishReason, ModelInfo, Observer, StepStats
from apiary_server.engine.scheduler import Scheduler
from apiary_server.engine.step import ScheduledChunk, StepPlan
from apiary_server.engine.turn import Turn
from apiary_server.model.runner import Piece, Runner
from apiary_server.model.sampler import Sampled, sample
from apiary_server.sessions.manager import SessionManager, resource_name
from apiary_server.sessions.residency import Residency
from apiary_server.sessions.session import TurnRecord

_log = structlog.get_logger(__name__)
_IDLE_WAIT = 0.5  # seconds between looks at expired sessions when nothing runs
_PAUSED_WAIT = 0.005  # seconds between looks at readers and memory when all turns wait


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds the engine; the same names as in `Settings`."""

    queue_limit: int
    step_limit: float
    reserve_slots: int
    parked_budget: int


class Engine:
    """Runs turns. `open`, `tokenize`, `detokenize`, `capacity` and `delete_session` are for any thread.

    Args:
        model: the served model and its limits.
        door: turns requests into turns, or refuses them.
        runner: the forward pass.
        scheduler: what runs next.
        sessions: the table of sessions.
        residency: their memory.
        limits: bounds.
        observer: receives plain numbers.
    """

    def __init__(
        self,
        model: ModelInfo,
        door: Door,
        runner: Runner,
        scheduler: Scheduler,
        sessions: SessionManager,
        residency: Residency,
        limits: Limits,
        observer: Observer | None = None,
    ) -> None:
        self.model = model
        self.sessions = sessions
        self.healthy = True
        self.on_unhealthy: Callable[[], None] | None = None
        self._door = door
        self._runner = runner
        self._scheduler = scheduler
        self._residency = residency
        self._limits = limits
        self._observer = observer or Observer()
        self._delivery = Delivery()
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._arriving = 0  # turns in the command queue
        self._arrivals = threading.Lock()
        self._draining = False
        self._stopping = threading.Event()
        self._step_began: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    # for any thread

    def start(self) -> None:
        """Start the loop and its watchdog."""
        self._thread.start()
        self._watchdog.start()

    def drain(self) -> None:
        """Take no new turns; those in flight go on."""
        self._draining = True

    def stop(self, grace: float) -> None:
        """Let turns finish for `grace` seconds, roll the others back, and end the loop."""
        self.drain()
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline and self._thread.is_alive() and self._turns():
            time.sleep(0.02)
        self._stopping.set()
        self._commands.put(lambda: None)
        self._thread.join(timeout=self._limits.step_limit)

    def open(self, request: TurnRequest, stream: TokenStream) -> None:
        """Check a request and queue its turn; the answer comes by `stream`. Blocks while it tokenises.

        Raises:
            Draining: the worker is shutting down.
            QueueFull: too many turns wait.
            InvalidField, SessionNotFound, SessionBusy, ContextFull: see `Door.admit`.
        """
        if self._draining:
            raise errors.Draining("the worker is shutting down; try another", retry_after=1.0)
        with self._arrivals:
            waiting = self._arriving + len(self._scheduler.waiting)
            if waiting >= self._limits.queue_limit:
                raise errors.QueueFull(
                    f"{waiting} turns wait, and {self._limits.queue_limit} may",
                    1.0,
                    limit=self._limits.queue_limit,
                )
            self._arriving += 1
        try:
            turn = self._door.admit(request, stream)
        except BaseException:
            with self._arrivals:
                self._arriving -= 1
            raise
        self._commands.put(lambda: self._arrive(turn))

    def tokenize(self, input: Text | Messages) -> list[int]:
        """Token ids of text, or of messages as a first turn."""
        return self._door.tokenizer.encode(input)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of token ids. Raises InvalidField if one is not in the vocabulary."""
        return self._door.tokenizer.decode(ids)

    def delete_session(self, tenant: str, id: str) -> Future[None]:
        """Take a session away, and its running turn with it; done when its memory is free.

        Raises:
            SessionNotFound: at once.
        """
        session = self.sessions.remove(tenant, id)
        done: Future[None] = Future()

        def forget() -> None:
            for turn in self._turns():
                if turn.session is session:
                    self._fail(turn, errors.Cancelled(f"{resource_name(id)} was deleted"))
            self._residency.free(session)
            done.set_result(None)

        self._commands.put(forget)
        return done

    def capacity(self) -> Capacity:
        """Budgets and what is in use."""
        pool, residency = self._residency.pool, self._residency
        return Capacity(
            budget_bytes=pool.budget,
            used_bytes=pool.used_bytes,
            peak_bytes=pool.peak_bytes,
            workspace_bytes=pool.workspace_bytes,
            workspaces=pool.workspaces,
            slot_bytes=pool.default.bytes,
            reserve_slots=self._limits.reserve_slots,
            max_resident_sessions=pool.places(pool.default) - self._limits.reserve_slots,
            resident_sessions=residency.resident_sessions,
            parked_sessions=residency.parked_sessions,
            parked_bytes=residency.parked_bytes,
            parked_budget_bytes=self._limits.parked_budget,
            sessions=len(self.sessions),
            running_turns=len(self._scheduler.running),
            queued_turns=len(self._scheduler.waiting) + self._arriving,
            queue_limit=self._limits.queue_limit,
        )

    # the engine thread

    def _run(self) -> None:
        with torch.inference_mode():
            try:
                while not self._stopping.is_set():
                    self.step()
                for turn in self._turns():
                    self._fail(turn, errors.Draining("the worker is shutting down; try another", 1.0))
                self._delivery.flush()
            except Exception:
                _log.exception("the engine loop broke")
                self._lose_health()

    def step(self) -> None:
        """One turn of the loop: take commands, end what is over, schedule, run, hand out."""
        self._take_commands()
        self._end_lost_turns()
        for session in self.sessions.remove_expired():
            self._residency.free(session)
        plan = self._scheduler.schedule()
        if plan.chunks:
            self._execute(plan)
        elif self._scheduler.waiting and not self._scheduler.running:
            self._refuse(self._scheduler.waiting[0])
        if not self._turns():
            self._residency.check_integrity()
        self._delivery.flush()

    def _take_commands(self) -> None:
        block = not any(not turn.paused for turn in self._scheduler.running) and not self._scheduler.waiting
        wait = _PAUSED_WAIT if self._turns() else _IDLE_WAIT
        with contextlib.suppress(queue.Empty):
            self._commands.get(block=block, timeout=wait)()
            while True:
                self._commands.get_nowait()()

    def _arrive(self, turn: Turn) -> None:
        with self._arrivals:
            self._arriving -= 1
            self._scheduler.add(turn)

    def _turns(self) -> list[Turn]:
        return [*self._scheduler.running, *self._scheduler.waiting]

    def _end_lost_turns(self) -> None:
        """Roll back the turns that nobody waits for any more."""
        now = time.monotonic()
        for turn in self._turns():
            deadline = turn.request.deadline
            if turn.stream.closed:
                self._fail(turn, errors.Cancelled("cancelled by the caller"))
            elif deadline is not None and now >= deadline:
                where = "in queue" if turn.started is None else "in flight"
                self._fail(
                    turn, errors.DeadlineExceeded(f"the deadline passed {where}; the turn was rolled back")
                )
            elif turn.stream.stalled(now):
                self._fail(
                    turn,
                    errors.ReaderStalled("the reader took nothing for too long; the turn was rolled back"),
                )

    def _refuse(self, turn: Turn) -> None:
        """Nothing runs that could give memory back, and still there is none for this turn."""
        pool = self._residency.pool
        self._fail(
            turn,
            errors.BudgetExhausted(
                "idle sessions fill the cache budget and the parked budget; delete some or let them expire",
                retry_after=5.0,
                needed=turn.session.layout.bytes,
                used=pool.used_bytes,
                budget=pool.budget,
            ),
        )

    def _execute(self, plan: StepPlan) -> None:
        began = self._step_began = time.monotonic()
        try:
            sampled = self._forward(plan)
        except Exception:
            error = self._incident("a step failed")
            for chunk in plan.chunks:
                self._fail(chunk.turn, error)
            return
        finally:
            self._step_began = None
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
        self._observe(plan, time.monotonic() - began, compactions, evicted)

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
        logits = self._runner.run(pieces)
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
            self._commit(turn, Delta())

    def _take_token(self, turn: Turn, sampled: Sampled) -> None:
        if sampled.token is None:
            raise FloatingPointError("the model's logits are not finite")
        turn.first_token = turn.first_token or time.monotonic()
        detokenizer = turn.detokenizer
        if sampled.token in turn.stop_tokens:
            turn.finish_reason = FinishReason.STOP
            released = detokenizer.finish()
        else:
            turn.tokens.append(sampled.token)
            if sampled.logprob is not None:
                turn.logprobs.append(sampled.logprob)
            released = detokenizer.add(sampled.token)
            cache = turn.transaction.cache
            if detokenizer.stopped:
                turn.finish_reason = FinishReason.STOP
            elif turn.generated >= turn.max_tokens or cache.n >= turn.session.layout.capacity:
                turn.finish_reason = FinishReason.LENGTH
                rest = detokenizer.finish()
                released.text += rest.text
                released.token_ids += rest.token_ids
        count = len(released.token_ids)
        delta = Delta(released.text, released.token_ids, turn.delivered, turn.logprobs[:count])
        del turn.logprobs[:count]
        turn.delivered += count
        if turn.finish_reason is None:
            if delta.text or delta.token_ids:
                self._delivery.send(turn.stream, delta)
        elif turn.delivered < turn.generated - 1:
            # tokens of the stop string are in the cache: forget them by computing the turn without them
            if delta.text or delta.token_ids:
                self._delivery.send(turn.stream, delta)
            turn.start_replay(keep=turn.delivered)
        else:
            del turn.tokens[turn.prompt_end + turn.delivered :]
            self._commit(turn, delta)

    def _commit(self, turn: Turn, last: Delta) -> None:
        turn.transaction.commit()
        chat = isinstance(turn.request.input, Messages)
        record = TurnRecord(turn.prompt_end - turn.carried, turn.delivered, chat)
        self.sessions.end_turn(turn.session, turn.tokens[turn.carried :], record)
        self._scheduler.remove(turn)
        now = time.monotonic()
        last.finish_reason, last.usage = turn.finish_reason, turn.usage(now)
        self._delivery.send(turn.stream, last)
        if turn.finish_reason is not None:
            self._observer.turn(turn.stats(now, turn.finish_reason.value))

    def _fail(self, turn: Turn, error: errors.ApiaryError) -> None:
        """End a turn as if it had never been."""
        turn.transaction.rollback()
        self.sessions.end_turn(turn.session)
        self._scheduler.remove(turn)
        self._delivery.send(turn.stream, error)
        self._observer.turn(turn.stats(time.monotonic(), type(error).__name__))

    def _incident(self, event: str) -> errors.Internal:
        """Log the exception that is being handled, whole, and give it a name that the caller may quote."""
        incident = secrets.token_hex(6)
        _log.exception(event, incident=incident)
        return errors.Internal(incident)

    def _observe(self, plan: StepPlan, duration: float, compactions: int, evicted: int) -> None:
        self._observer.step(
            StepStats(
                duration=duration,
                prefill_tokens=plan.prefill_tokens,
                decode_tokens=plan.decode_tokens,
                compactions=compactions,
                evicted_entries=evicted,
                running_turns=len(self._scheduler.running),
                queued_turns=len(self._scheduler.waiting) + self._arriving,
                used_bytes=self._residency.pool.used_bytes,
                parked_bytes=self._residency.parked_bytes,
                resident_sessions=self._residency.resident_sessions,
                sessions=len(self.sessions),
            )
        )

    # the watchdog thread

    def _watch(self) -> None:
        while self.healthy and not self._stopping.wait(min(1.0, self._limits.step_limit / 4)):
            began = self._step_began
            if began is not None and time.monotonic() - began > self._limits.step_limit:
                _log.critical("a step hangs", seconds=round(time.monotonic() - began, 1))
                self._lose_health()

    def _lose_health(self) -> None:
        self.healthy = False
        if self.on_unhealthy is not None:
            self.on_unhealthy()
