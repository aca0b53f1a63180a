"""One turn as the load generator saw it."""

from __future__ import annotations

import enum
from contextlib import aclosing
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter

from apiary_bench.serving.plan import Turn
from apiary_client import Stopping, Usage, aio
from apiary_client.errors import ApiaryError


class Outcome(enum.StrEnum):
    """How a turn ended."""

    COMPLETED = "completed"
    """With all the tokens that were asked for."""
    CANCELLED = "cancelled"
    """By the load generator, on purpose."""
    CUT_SHORT = "cut_short"
    """Without an error, but with fewer tokens."""
    FAILED = "failed"
    """With an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One turn. Times in seconds.

    Attributes:
        session, turn: which, from 0.
        scheduled: when it was to be sent, after the beginning of the measured turns; None in a closed loop.
        sent: when it was.
        ended: from then to its end: the last message, the cancellation or the error.
        arrivals: from `sent` to each message that brought tokens. Messages without any are not among them.
        arrival_tokens: how many tokens each of those brought.
        input: tokens sent.
        asked: output tokens asked for.
        cancel_after: output tokens after which it was to be cancelled, if it was.
        outcome: how it ended.
        reason: of a failure: the worker's reason, or the gRPC status where it named none.
        message: of a failure: what the worker said.
        usage: what the worker says that it cost; None unless it came to its end.
    """

    session: int
    turn: int
    scheduled: float | None = None
    sent: float
    ended: float
    arrivals: tuple[float, ...] = ()
    arrival_tokens: tuple[int, ...] = ()
    input: int
    asked: int
    cancel_after: int | None = None
    outcome: Outcome
    reason: str | None = None
    message: str | None = None
    usage: Usage | None = None

    @property
    def tokens(self) -> int:
        """Output tokens that came."""
        return sum(self.arrival_tokens)

    @property
    def ttft(self) -> float | None:
        """Time to first token: from the request to the first message with a token."""
        return self.arrivals[0] if self.arrivals else None

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first: (last token - first token) / (tokens - 1). None below two
        tokens."""
        return (self.arrivals[-1] - self.arrivals[0]) / (self.tokens - 1) if self.tokens > 1 else None

    @property
    def itl(self) -> list[float]:
        """Inter-token latencies: the gaps between successive arrivals. Tokens of one message are one arrival,
        as in `vllm bench serve`: a gap is neither divided among them nor followed by gaps of zero."""
        return [after - before for before, after in pairwise(self.arrivals)]

    @property
    def e2el(self) -> float:
        """End-to-end latency: from the request to the answer's last message."""
        return self.ended

    @property
    def delay(self) -> float | None:
        """Start delay: how much later than scheduled it was sent. None in a closed loop."""
        return None if self.scheduled is None else self.sent - self.scheduled


async def measure(
    client: aio.Client, session: str, turn: Turn, began: float, deadline: float | None = None
) -> Record:
    """Run one turn of a session and note when what came.

    Args:
        client: of the session's tenant.
        session: its name.
        turn: what to send; greedy, past end-of-turn tokens.
        began: `perf_counter` at the beginning of the measured turns.
        deadline: seconds that it may take.
    """
    arrivals: list[float] = []
    counts: list[int] = []
    tokens = 0
    outcome = Outcome.FAILED
    usage: Usage | None = None
    reason = message = None
    stream = client.stream(
        token_ids=turn.token_ids,
        session=session,
        stopping=Stopping(max_tokens=turn.output, ignore_eos=True),
        timeout=deadline,
    )
    sent = now = perf_counter()
    try:
        async with aclosing(stream):
            async for delta in stream:
                now = perf_counter()
                if delta.token_ids:
                    arrivals.append(now - sent)
                    counts.append(len(delta.token_ids))
                    tokens += len(delta.token_ids)
                usage = delta.usage
                if usage is None and turn.cancel_after is not None and tokens >= turn.cancel_after:
                    outcome = Outcome.CANCELLED
                    break
            else:
                whole = usage is not None and tokens == turn.output
                outcome = Outcome.COMPLETED if whole else Outcome.CUT_SHORT
    except ApiaryError as error:
        now = perf_counter()
        reason, message = error.reason or error.code.name, error.message
    return Record(
        session=turn.session,
        turn=turn.number,
        scheduled=turn.at,
        sent=sent - began,
        ended=now - sent,
        arrivals=tuple(arrivals),
        arrival_tokens=tuple(counts),
        input=len(turn.token_ids),
        asked=turn.output,
        cancel_after=turn.cancel_after,
        outcome=outcome,
        reason=reason,
        message=message,
        usage=usage,
    )
