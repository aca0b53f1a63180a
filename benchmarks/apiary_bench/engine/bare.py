"""The bare engine: all that a worker runs but gRPC, driven from one event loop."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

from apiary_bench.errors import LoadError
from apiary_server.engine.delivery import TokenStream
from apiary_server.engine.engine import Engine
from apiary_server.engine.request import Stopping, TokenIds, TurnRequest
from apiary_server.sessions.info import State

_TENANT = "default"
_STALL = 600.0  # seconds; readers here never stall, and may be held up by what they measure


@dataclass(frozen=True, slots=True)
class Answer:
    """One turn as its reader saw it.

    Attributes:
        sent, first, last: when it was sent, and when its first and its last tokens came, in seconds of
            `perf_counter`.
        tokens: how many came.
        decoding: seconds from its first token to its last, as the engine made them: a reader that is behind
            gets several at once.
    """

    sent: float
    first: float
    last: float
    tokens: int
    decoding: float

    @property
    def ttft(self) -> float:
        """Time to first token."""
        return self.first - self.sent

    @property
    def tpot(self) -> float:
        """Time per output token after the first; of two tokens or more."""
        return self.decoding / (self.tokens - 1)


class Bare:
    """An engine that runs while the context is open, with random input for it.

    Attributes:
        engine: it.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._random = random.Random(0)  # noqa: S311 - repeatable, not secret
        special = set(engine.model.eos_token_ids)
        self._vocabulary = [token for token in range(engine.model.vocab_size) if token not in special]

    def __enter__(self) -> Bare:
        self.engine.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.stop(grace=0)

    def create(self, count: int) -> list[str]:
        """Empty sessions of the default policy; returns their names."""
        return [self.engine.sessions.create(_TENANT, None, None, None, None, {}).id for _ in range(count)]

    def delete(self, sessions: Sequence[str]) -> None:
        """Delete sessions, and wait until their memory is free."""
        for done in [self.engine.keeper.delete(_TENANT, session) for session in sessions]:
            done.result()

    def those(self, sessions: Sequence[str], state: State) -> list[str]:
        """Those of the sessions that are in this state."""
        return [name for name in sessions if self.engine.sessions.get(_TENANT, name).state is state]

    async def turn(self, session: str, input: int, output: int) -> Answer:
        """One greedy turn of `input` random tokens, which answers `output` tokens.

        Raises:
            LoadError: it answered fewer.
            ApiaryError: it failed.
        """
        ids = tuple(self._random.choices(self._vocabulary, k=input))
        request = TurnRequest(
            input=TokenIds(ids=ids),
            session=session,
            stopping=Stopping(max_tokens=output, ignore_eos=True),
        )
        stream = TokenStream(asyncio.get_running_loop(), capacity=output + 1, stall_limit=_STALL)
        arrivals, tokens, decoding = [], 0, 0.0
        sent = perf_counter()
        self.engine.open(request, stream)
        async for delta in stream:
            if delta.token_ids:
                arrivals.append(perf_counter())
                tokens += len(delta.token_ids)
            if delta.usage is not None:
                decoding = delta.usage.decode_time
        if tokens < output:
            policy = self.engine.model.default_policy
            raise LoadError(
                f"a turn ended after {tokens} of {output} tokens, since {policy} holds no more: make it "
                "larger, or choose a policy that evicts"
            )
        return Answer(sent, arrivals[0], arrivals[-1], tokens, decoding)

    async def turns(
        self, sessions: Sequence[str], input: int, output: int, ended: Callable[[], None] = lambda: None
    ) -> list[Answer]:
        """A turn of each session, all at the same time; `ended` is called at the end of each."""

        async def turn(session: str) -> Answer:
            answer = await self.turn(session, input, output)
            ended()
            return answer

        return await asyncio.gather(*map(turn, sessions))
