"""A turn in flight: its tokens, how far they are computed, and what ends it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from apiary_server.engine.delivery import TokenStream
from apiary_server.engine.request import Messages, TurnRequest
from apiary_server.engine.result import Delta, FinishReason, TokenLogprob, TurnStats, Usage
from apiary_server.errors import ApiaryError
from apiary_server.model.detokenizer import Detokenizer
from apiary_server.model.sampler import Choice, Sampled
from apiary_server.sessions.info import RebuildReason
from apiary_server.sessions.session import Session, TurnRecord
from apiary_server.sessions.transaction import Transaction


@dataclass(eq=False, slots=True)
class Turn:
    """One turn from submission to its end. The engine thread owns it.

    `tokens` are the session's uncached tokens, the input, and what was generated; the first `computed` of
    them are in the cache. Prefill and decode differ in nothing else: what is left to compute is
    `len(tokens) - computed`.

    While it waits, its session's cache may leave memory, and is read again when it starts, or lost: what
    depends on it is settled then.
    """

    request: TurnRequest
    session: Session
    transaction: Transaction
    stream: TokenStream
    detokenizer: Detokenizer
    input: Sequence[int]
    max_tokens: int
    stop_tokens: frozenset[int]
    seed: int
    cached_tokens: int  # until it starts, as many as the cache should have then
    digest: str = ""  # of the request, if it has an id
    arrived: float = field(default_factory=time.monotonic)

    tokens: list[int] = field(init=False)
    prompt_end: int = field(init=False)
    carried: int = field(init=False)  # of `tokens`, those of earlier turns, which are not in the cache
    history: Sequence[tuple[int, bool]] = field(init=False)  # of a cache to rebuild, where its segments end
    rebuild: RebuildReason | None = field(init=False)

    computed: int = 0
    segment_end: int = 0
    delivered: int = 0  # generated tokens sent to the reader
    logprobs: list[TokenLogprob] = field(default_factory=list)  # of generated tokens that are held back
    evicted: int = 0
    replaying: bool = False  # feeding back what was delivered, and no more
    finish_reason: FinishReason | None = None
    read_before: int = 0  # generated tokens that earlier calls of the same request took
    detached: float | None = None  # since when nobody reads, and the same request may come again
    cut: ApiaryError | None = None  # what cut it short, where the answer is kept
    started: float | None = None
    first_token: float | None = None

    def __post_init__(self) -> None:
        self._go_on_from_cache()

    @property
    def tenant(self) -> str:
        """Whose turn it is."""
        return self.request.tenant

    @property
    def priority(self) -> int:
        """Higher goes first among the turns of one tenant."""
        return self.request.priority

    @property
    def generated(self) -> int:
        """How many tokens were generated."""
        return len(self.tokens) - self.prompt_end

    @property
    def remaining(self) -> int:
        """How many known tokens are not computed."""
        return len(self.tokens) - self.computed

    @property
    def context(self) -> int:
        """How many entries its next token attends to, beside itself."""
        cache = self.session.cache
        return 0 if cache is None else cache.n

    @property
    def decoding(self) -> bool:
        """Whether its next chunk is a token that it generated."""
        return self.computed >= self.prompt_end and not self.replaying

    @property
    def paused(self) -> bool:
        """Whether it waits for its reader."""
        return self.stream.full

    @property
    def starved(self) -> bool:
        """Whether it has started and waits for a slot."""
        return self.transaction.starved

    @property
    def stored(self) -> bool:
        """Whether its session's cache is not in memory, though it has turns."""
        return self.session.cache is None and bool(self.session.turns)

    @property
    def resident(self) -> bool:
        """Whether its session has a slot."""
        return self.session.lease is not None

    def open(self) -> bool:
        """Lease what the turn needs to start; False if there is no room now."""
        return self.transaction.open()

    def load(self) -> bool:
        """Whether it can go on from its session's cache; False while that is read from the store."""
        if self.started is None:
            if not self.transaction.load():
                return False
            self.cached_tokens = self.transaction.cache.seen
            self._go_on_from_cache()
            self.started = time.monotonic()
        return True

    def _go_on_from_cache(self) -> None:
        session = self.session
        carried = session.transcript[self.cached_tokens :].tolist()
        self.tokens = [*carried, *self.input]
        self.prompt_end, self.carried = len(self.tokens), len(carried)
        self.history = session.missing(self.cached_tokens)
        self.rebuild = session.rebuild

    def begin_segment(self) -> bool:
        """Make room for the next tokens; False if the turn has to wait for memory."""
        if self.computed < self.segment_end:
            return True
        end, prompt = len(self.tokens), False
        if self.computed < self.prompt_end:
            stretches = (*self.history, (self.prompt_end, True))
            end, prompt = next(stretch for stretch in stretches if self.computed < stretch[0])
        self.segment_end += self.transaction.begin_segment(end - self.computed, prompt=prompt)
        return self.computed < self.segment_end

    def choice(self) -> Choice:
        """How the next token is to be sampled."""
        sampling = self.request.sampling
        choice = Choice(sampling, self.seed, self.generated, self.request.logprobs)
        if sampling.penalises:
            choice.prompt, choice.output = self.tokens[: self.prompt_end], self.tokens[self.prompt_end :]
        return choice

    def take(self, sampled: Sampled) -> Delta:
        """Take the next token, and set `finish_reason` if it is the last. Returns what may be shown now.

        Raises:
            FloatingPointError: the model gave no usable logits.
        """
        if sampled.token is None:
            raise FloatingPointError("the model's logits are not finite")
        self.first_token = self.first_token or time.monotonic()
        if sampled.token in self.stop_tokens:
            self.finish_reason = FinishReason.STOP
            released = self.detokenizer.finish()
        else:
            self.tokens.append(sampled.token)
            if sampled.logprob is not None:
                self.logprobs.append(sampled.logprob)
            released = self.detokenizer.add(sampled.token)
            if self.detokenizer.stopped:
                self.finish_reason = FinishReason.STOP
            elif self.generated >= self.max_tokens or self.transaction.full:
                self.finish_reason = FinishReason.LENGTH
                rest = self.detokenizer.finish()
                released.text += rest.text
                released.token_ids += rest.token_ids
        count = len(released.token_ids)
        delta = Delta(released.text, released.token_ids, self.delivered, self.logprobs[:count])
        del self.logprobs[:count]
        self.delivered += count
        if self.finish_reason is not None and not self.forgets:
            del self.tokens[self.prompt_end + self.delivered :]
        return delta

    @property
    def forgets(self) -> bool:
        """Whether the cache holds tokens that were not delivered, which the session must not keep."""
        return self.finish_reason is not None and self.computed > self.prompt_end + self.delivered

    def keep(self, taken: int, error: ApiaryError) -> None:
        """The turn is cut short: of its answer stays what its reader took, which is computed to its last
        token, so that the outcome does not depend on how far the turn was ahead."""
        self.cut, self.finish_reason = error, FinishReason.CANCELLED
        self.delivered = taken
        if self.forgets:
            self.start_replay()
        else:
            del self.tokens[self.prompt_end + taken :]
            self.replaying = True

    def start_replay(self) -> None:
        """Compute the turn again from its beginning, with only what was delivered."""
        self.transaction.restart()
        del self.tokens[self.prompt_end + self.delivered :]
        self.computed = self.segment_end = self.evicted = 0
        self.replaying = True

    def attach(self, request: TurnRequest, stream: TokenStream) -> None:
        """Go on for the same request that came again."""
        self.request, self.stream, self.detached = request, stream, None
        self.read_before = min(request.next_index, self.delivered)
        self.session.abandoned = lambda: stream.closed

    def record(self) -> TurnRecord:
        """What the session keeps of it."""
        request = self.request
        return TurnRecord(
            prompt_tokens=self.prompt_end - self.carried,
            completion_tokens=self.delivered,
            chat=isinstance(request.input, Messages),
            seen=self.cached_tokens + self.computed,
            finish=self.finish_reason.value if self.finish_reason is not None else "",
            seed=self.seed,
            cached_tokens=self.cached_tokens,
            evicted_entries=self.evicted,
            tail=self.detokenizer.tail if self.cut is None else "",
            request_id=request.request_id,
            digest=self.digest,
        )

    def usage(self, now: float) -> Usage:
        """What the turn cost."""
        started = self.started or now
        first = self.first_token or now
        return Usage(
            prompt_tokens=self.prompt_end - self.carried,
            cached_tokens=self.cached_tokens,
            completion_tokens=self.delivered,
            evicted_entries=self.evicted,
            queue_time=started - self.arrived,
            prefill_time=first - started,
            decode_time=now - first,
            seed=self.seed,
            rebuild_reason=self.rebuild,
        )

    def stats(self, now: float, outcome: str) -> TurnStats:
        """The ended turn as plain numbers."""
        return TurnStats(
            tenant=self.tenant,
            session=self.session.id or None,
            outcome=outcome,
            arrived=self.arrived,
            started=self.started,
            first_token=self.first_token,
            ended=now,
            prompt_tokens=self.prompt_end - self.carried,
            cached_tokens=self.cached_tokens,
            completion_tokens=self.delivered,
            evicted_entries=self.evicted,
            trace=self.request.trace,
        )
