"""The door: turns a request into a turn of its session, or refuses it with the numbers in the error."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from concurrent.futures import Future

from apiary_server.engine.delivery import TokenStream
from apiary_server.engine.request import Messages, Text, TokenIds, TurnRequest
from apiary_server.engine.result import Delta, FinishReason, ModelInfo, Usage
from apiary_server.engine.scheduler import Scheduler
from apiary_server.engine.turn import Turn
from apiary_server.errors import ContextFull, InvalidField
from apiary_server.model.detokenizer import Detokenizer
from apiary_server.model.tokenizer import Tokenizer
from apiary_server.sessions.manager import SessionManager
from apiary_server.sessions.residency import Residency
from apiary_server.sessions.session import Answer, Session
from apiary_server.sessions.transaction import Transaction
from buzz import Policy, PolicyError, Rotary


class Door:
    """Checks what depends on the model, the session and the queue; fixed limits are checked by `TurnRequest`
    itself. Thread-safe."""

    def __init__(
        self,
        model: ModelInfo,
        tokenizer: Tokenizer,
        sessions: SessionManager,
        residency: Residency,
        rotary: Rotary,
        scheduler: Scheduler,
    ) -> None:
        self.tokenizer = tokenizer
        self._model = model
        self._sessions = sessions
        self._residency = residency
        self._rotary = rotary
        self._scheduler = scheduler

    def earlier(self, request: TurnRequest) -> Turn | Answer | None:
        """The turn, in flight or committed, that this request had when it came before.

        Raises:
            InvalidField: the request id is another request's.
            SessionNotFound: unknown, expired or another tenant's.
        """
        if request.session is None or request.request_id is None:
            return None
        for turn in self._scheduler.turns():
            other = turn.request
            if (other.tenant, other.session, other.request_id) == (
                request.tenant,
                request.session,
                request.request_id,
            ):
                _check_same(request, turn.digest)
                return turn
        answer = self._sessions.answer(request.tenant, request.session, request.request_id)
        if answer is not None:
            _check_same(request, answer.record.digest)
        return answer

    def again(self, request: TurnRequest, tokens: Sequence[int]) -> Delta:
        """An answer so far as one delta, from the place on that the request asks for.

        Raises:
            InvalidField: it has no such place.
        """
        if request.next_index > len(tokens):
            why = f"is {request.next_index}, and the answer has {len(tokens)} tokens so far"
            raise InvalidField([("next_index", why)])
        detokenizer = Detokenizer(self.tokenizer.backend)
        delta, place = Delta(index=request.next_index, token_ids=list(tokens[request.next_index :])), 0
        for released in (*map(detokenizer.add, tokens), detokenizer.finish()):
            place += len(released.token_ids)
            if place > request.next_index:
                delta.text += released.text
        return delta

    def replay(self, request: TurnRequest, answer: Answer) -> Delta:
        """A committed answer, from the place on that the request asks for.

        Raises:
            InvalidField: it has no such place.
        """
        record, delta = answer.record, self.again(request, answer.token_ids)
        delta.text += record.tail
        delta.finish_reason = FinishReason(record.finish)
        delta.usage = Usage(
            prompt_tokens=record.prompt_tokens,
            cached_tokens=record.cached_tokens,
            completion_tokens=record.completion_tokens,
            evicted_entries=record.evicted_entries,
            queue_time=0.0,
            prefill_time=0.0,
            decode_time=0.0,
            seed=record.seed,
        )
        return delta

    def knock(self, request: TurnRequest, stream: TokenStream) -> Future[Session]:
        """Have the next turn of the request's session; see `SessionManager.begin_turn`.

        Raises:
            InvalidField: a limit or a token id does not fit the model or the worker.
            SessionNotFound: unknown, expired or another tenant's.
            SessionBusy: another turn is in flight.
        """
        self._check(request)
        if request.session is not None:
            return self._sessions.begin_turn(
                request.tenant, request.session, lambda: stream.closed, wait=request.wait
            )
        alone: Future[Session] = Future()
        alone.set_result(self._sessions.one_shot(request.tenant, request.policy))
        return alone

    def admit(self, request: TurnRequest, stream: TokenStream, session: Session) -> Turn:
        """Build a turn of a session; the session's turn is over if it is refused.

        Raises:
            InvalidField: the input does not fit the model, the worker or the session.
            ContextFull: the input exceeds what the session's cache may hold.
            DeadlineExceeded: the first token could not come in time.
        """
        try:
            turn = self._turn(request, stream, session)
            self._scheduler.check_deadline(turn)
            return turn
        except BaseException:
            self._sessions.end_turn(session)
            raise

    def _turn(self, request: TurnRequest, stream: TokenStream, session: Session) -> Turn:
        input = self._input(request, session)
        most = self._model.max_prompt_tokens
        if not 1 <= len(input) <= most:
            why = f"the input has {len(input)} tokens; a turn takes 1 to {most}"
            raise InvalidField([(_field(request), why)])
        policy = session.policy if session.turns else self._pinning(session.policy, request, input)
        bound, cached = session.policy.bound, session.turns[-1].seen if session.turns else 0
        tokens = len(session.transcript) - cached + len(input)
        if not session.policy.evicts and cached + tokens > bound:
            raise ContextFull(
                f"{tokens} more tokens do not fit: the session's cache keeps {cached} and its policy "
                f"{session.policy} holds at most {bound}; send less, or use a policy that evicts, like buzz",
                cached=cached,
                prompt=tokens,
                bound=bound,
            )
        stopping, seed = request.stopping, request.sampling.seed
        eos = () if stopping.ignore_eos else self._model.eos_token_ids
        return Turn(
            request=request,
            session=session,
            transaction=Transaction(session, self._residency, self._rotary, policy),
            stream=stream,
            detokenizer=Detokenizer(self.tokenizer.backend, stopping.stop),
            input=input,
            max_tokens=stopping.max_tokens or self._model.default_max_tokens,
            stop_tokens=frozenset((*eos, *stopping.stop_token_ids)),
            seed=secrets.randbits(64) if seed is None else seed,
            cached_tokens=self._residency.seen(session),
            digest=request.digest if request.request_id is not None else "",
        )

    def _pinning(self, policy: Policy, request: TurnRequest, input: Sequence[int]) -> Policy:
        """A policy as it is from a session's first turn on."""
        if policy.pinned != "system":
            return policy
        messages = request.input.messages if isinstance(request.input, Messages) else ()
        try:
            return policy.pinning(self.tokenizer.opening(messages, input) if messages else 0)
        except PolicyError as error:
            raise InvalidField(
                [("messages.messages[0]", f"the system prompt is too long: {error}")]
            ) from error

    def _check(self, request: TurnRequest) -> None:
        most, asked = self._model.max_tokens, request.stopping.max_tokens
        if asked is not None and asked > most:
            raise InvalidField([("stopping.max_tokens", f"{asked} is more than this worker's {most}")])
        self.tokenizer.check(request.stopping.stop_token_ids, "stopping.stop_token_ids")
        for id in request.sampling.logit_bias:
            self.tokenizer.check([id], "sampling.logit_bias", first=id)

    def _input(self, request: TurnRequest, session: Session) -> Sequence[int]:
        input, first = request.input, not session.turns
        if isinstance(input, TokenIds):
            self.tokenizer.check(input.ids, "token_ids.ids")
            return input.ids
        if isinstance(input, Text):
            return self.tokenizer.encode(input, first=first)
        if not first and input.messages[0].role == "system":
            why = "a system message can only open a session, and this one has begun"
            raise InvalidField([("messages.messages[0].role", why)])
        open_reply = not first and session.turns[-1].chat
        return self.tokenizer.encode(input, first=first, open_reply=open_reply)


def _check_same(request: TurnRequest, digest: str) -> None:
    if request.digest != digest:
        raise InvalidField([("request_id", "was the id of another request to this session: draw a new one")])


def _field(request: TurnRequest) -> str:
    return {Messages: "messages", Text: "text", TokenIds: "token_ids"}[type(request.input)]
