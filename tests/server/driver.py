"""Drives an engine by hand: no threads, no event loop, one step at a time."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

from apiary_server.engine.delivery import TokenStream
from apiary_server.engine.engine import Engine
from apiary_server.engine.request import (
    Message,
    Messages,
    Sampling,
    Stopping,
    Text,
    TokenIds,
    TurnRequest,
)
from apiary_server.engine.result import Delta, TokenLogprob, Usage
from apiary_server.errors import ApiaryError
from apiary_server.sessions.session import Session

_Outcome = TypeVar("_Outcome")


class _Now:
    """An event loop that does at once what it is asked to do soon."""

    def call_soon_threadsafe(self, callback: Any, *args: Any) -> None:
        callback(*args)


class Reader(TokenStream):
    """Collects what a turn answers. With `reads=False` it leaves everything waiting."""

    def __init__(self, *, reads: bool = True, capacity: int = 1024, stall_limit: float = 30.0) -> None:
        super().__init__(_Now(), capacity, stall_limit)  # type: ignore[arg-type]
        self.reads = reads
        self.deltas: list[Delta] = []
        self.error: ApiaryError | None = None

    def put(self, delta: Delta | ApiaryError) -> None:
        if isinstance(delta, ApiaryError):
            self.error = delta
            return
        if self.closed:  # a reader that is gone, or may take no more, sees no text
            delta = Delta(index=delta.index, finish_reason=delta.finish_reason, usage=delta.usage)
        self.deltas.append(delta)
        if self.reads:
            self.read()

    def read(self, tokens: int | None = None) -> None:
        """Take what waits, or so many tokens of it."""
        self._taken = self._sent if tokens is None else self._taken + tokens

    @property
    def ended(self) -> bool:
        return self.error is not None or any(delta.finish_reason is not None for delta in self.deltas)

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def token_ids(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.token_ids]

    @property
    def logprobs(self) -> list[TokenLogprob]:
        return [logprob for delta in self.deltas for logprob in delta.logprobs]

    @property
    def usage(self) -> Usage:
        usage = self.deltas[-1].usage
        assert usage is not None
        return usage


def request(
    input: str | list[int] | list[tuple[str, str]],
    session: str | None = None,
    *,
    max_tokens: int = 16,
    ignore_eos: bool = True,
    stop: tuple[str, ...] = (),
    stop_token_ids: tuple[int, ...] = (),
    sampling: Sampling | None = None,
    **fields: Any,
) -> TurnRequest:
    """A turn: a string is text, integers are token ids, pairs are (role, content) messages."""
    parsed: Text | TokenIds | Messages
    if isinstance(input, str):
        parsed = Text(text=input)
    elif isinstance(input[0], int):
        parsed = TokenIds(ids=tuple(input))  # type: ignore[arg-type]
    else:
        parsed = Messages(messages=tuple(Message(role=role, content=content) for role, content in input))  # type: ignore[misc, arg-type]
    stopping = Stopping(
        max_tokens=max_tokens, ignore_eos=ignore_eos, stop=stop, stop_token_ids=stop_token_ids
    )
    return TurnRequest(
        input=parsed, session=session, stopping=stopping, sampling=sampling or Sampling(), **fields
    )


def begin(engine: Engine, turn: TurnRequest, **reader: Any) -> Reader:
    """Submit a turn."""
    stream = Reader(**reader)
    engine.open(turn, stream)
    return stream


def run(engine: Engine, *readers: Reader, steps: int = 5000) -> None:
    """Step until all readers have their ends."""
    with torch.inference_mode():
        for _ in range(steps):
            if all(reader.ended for reader in readers):
                return
            wake(engine)
            engine._loop.step()
    raise AssertionError(f"not ended after {steps} steps")


def one_step(engine: Engine) -> None:
    """Step, and hand out what came of it, which else happens while the next step computes."""
    engine._loop.step()
    engine._loop._hand_over()


def wake(engine: Engine) -> None:
    """Let other threads go on, and have the next step not wait for them: the store's sends no command."""
    if engine._loop._idle:
        time.sleep(0.001)
        engine._mailbox.post(lambda: None)


def step(engine: Engine, count: int = 1) -> None:
    """Step the engine by hand, and hand out what came of it; there must be a turn, or each step waits."""
    with torch.inference_mode():
        for _ in range(count - 1):
            engine._loop.step()
        if count:
            one_step(engine)


def until(engine: Engine, condition: Callable[[], bool]) -> None:
    """Step until it is so."""
    for _ in range(1000):
        if condition():
            return
        wake(engine)
        step(engine)
    raise AssertionError("it takes too long")


def outcome(engine: Engine, change: Future[_Outcome]) -> _Outcome:
    """What a change of a session comes to: a step makes it, where it was not made at once."""
    if not change.done():
        step(engine)
    return change.result(0)


def ask(engine: Engine, *args: Any, **fields: Any) -> Reader:
    """Run one turn to its end."""
    reader = begin(engine, request(*args, **fields))
    run(engine, reader)
    return reader


def session(engine: Engine, id: str, tenant: str = "default") -> Session:
    """The engine's own record of a session."""
    return engine.sessions._sessions[tenant, id]


def create(engine: Engine, id: str, policy: str | None = None, **fields: Any) -> str:
    """Create a session; returns its id."""
    arguments: dict[str, Any] = {"tenant": "default", "expire_time": None, "ttl": None, "labels": {}}
    return engine.sessions.create(id=id, policy=policy, **(arguments | fields)).id


def state(record: Session) -> dict[str, object]:
    """Everything that a turn may change, copied: compare with `same`."""
    copied: dict[str, object] = {
        "transcript": record.transcript.tolist(),
        "turns": [dataclasses.replace(turn, seed=0) for turn in record.turns],  # drawn, if not given
        "busy": record.busy,
        "update_time": record.update_time,
    }
    cache = record.cache
    if cache is not None:
        n = cache.n
        copied["counts"] = cache.state()
        source = cache.buffers
        if record.parked is None:
            copied["keys"] = source.keys[:, :, : n - cache.packed].clone()
            copied["values"] = source.values[:, :, : n - cache.packed].clone()
            if source.packed is not None and cache.measured:
                *entries, copied["channels"] = (tensor.clone() for tensor in source.packed.tensors)
                copied |= {f"packed {i}": tensor[:, :, : cache.packed] for i, tensor in enumerate(entries)}
            copied["position"] = source.position[:, :, :n].clone()
            copied |= {name: state[:, :, :n].clone() for name, state in source.state.items()}
    return copied


def same(one: dict[str, object], other: dict[str, object]) -> bool:
    """Whether two states are equal, tensors bit for bit."""
    if one.keys() != other.keys():
        return False
    for key, value in one.items():
        theirs = other[key]
        if isinstance(value, torch.Tensor):
            if not isinstance(theirs, torch.Tensor) or not torch.equal(value, theirs):
                return False
        elif value != theirs:
            return False
    return True


def alike(one: dict[str, object], other: dict[str, object]) -> bool:
    """Whether two states are equal but for the order of sums: who computes tokens together, or at once."""
    return one.keys() == other.keys() and all(
        torch.allclose(value, other[key], atol=1e-4)  # type: ignore[arg-type]
        if isinstance(value, torch.Tensor)
        else value == other[key]
        for key, value in one.items()
    )
