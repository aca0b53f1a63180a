"""A worker's client without a worker: answers at once, and remembers what it was asked."""

# ruff: noqa: ASYNC109 - the signatures are those of the client

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Self, cast

import grpc

from apiary_client import Capacity, Delta, FinishReason, Model, State, Stopping, Usage, aio
from apiary_client.errors import SessionBusy, SessionNotFound

MODEL = Model(
    name="models/fake",
    architecture="LlamaForCausalLM",
    layers=2,
    query_heads=4,
    kv_heads=2,
    head_dim=8,
    vocab_size=20,
    max_positions=1024,
    weight_dtype="float32",
    cache_dtype="bfloat16",
    default_policy="buzz",
    default_max_tokens=512,
    max_tokens=1000,
    max_prompt_tokens=100,
    eos_token_ids=(0, 2),
    chat=True,
)


def capacity(used: int = 0) -> Capacity:
    """Of a worker of a GiB."""
    return Capacity(2**30, used, used, 0, 1, 2**20, 1, 1000, 0, 0, 0, 0, 0, 0, 0, 256)


def usage(prompt: int, cached: int, completion: int) -> Usage:
    """What a turn cost that took no time."""
    return Usage(prompt, cached, completion, 0, 0.0, 0.0, 0.0, 0)


@dataclass(frozen=True)
class Asked:
    """A turn that was asked for."""

    session: str | None
    token_ids: tuple[int, ...]
    max_tokens: int
    timeout: float | None


@dataclass
class FakeWorker:
    """What all clients of it share.

    Attributes:
        answer: what comes of the n-th turn (from 0) of a session: numbers of tokens, one message each; an
            exception among them is raised in its place. Default: one token a message, as many as asked for.
        rollback: looks at a session that is found busy after a cancelled turn.
        undeletable: raised by deletions.
        sessions: tokens of the history of each session, by tenant and name.
    """

    answer: Callable[[str | None, int, int], Sequence[int | Exception]] = lambda _session, _turn, most: (
        [1] * most
    )
    rollback: int = 0
    undeletable: Exception | None = None
    sessions: dict[tuple[str | None, str], int] = field(default_factory=dict)
    created: list[tuple[str | None, str]] = field(default_factory=list)
    policies: set[str | None] = field(default_factory=set)
    asked: list[Asked] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    turns: Counter[str | None] = field(default_factory=Counter)
    busy: Counter[str | None] = field(default_factory=Counter)

    def connect(self, tenant: str | None) -> aio.Client:
        """A client of a tenant."""
        return cast(aio.Client, FakeClient(self, tenant))

    def turns_of(self, session: str) -> list[Asked]:
        """What was asked of a session, in order."""
        return [asked for asked in self.asked if asked.session == session]


@dataclass
class FakeClient:
    """The methods that a load needs."""

    worker: FakeWorker
    tenant: str | None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def get_model(self, *, timeout: float) -> Model:
        return MODEL

    async def get_capacity(self, *, timeout: float) -> Capacity:
        return capacity(sum(self.worker.sessions.values()))

    async def create_session(
        self, session_id: str, *, policy: str | None, labels: dict[str, str], timeout: float
    ) -> Any:
        self.worker.sessions[self.tenant, f"sessions/{session_id}"] = 0
        self.worker.created.append((self.tenant, f"sessions/{session_id}"))
        self.worker.policies.add(policy)
        return SimpleNamespace(policy=policy or "the default")

    async def get_session(self, session: str, *, timeout: float) -> Any:
        self.worker.busy[session] -= 1
        return SimpleNamespace(state=State.BUSY if self.worker.busy[session] >= 0 else State.RESIDENT)

    async def delete_session(self, session: str, *, timeout: float) -> None:
        if self.worker.undeletable is not None:
            raise self.worker.undeletable
        if self.worker.sessions.pop((self.tenant, session), None) is None:
            raise SessionNotFound(f"no session {session}", code=grpc.StatusCode.NOT_FOUND)

    async def stream(
        self,
        *,
        token_ids: Sequence[int],
        session: str | None,
        stopping: Stopping,
        timeout: float | None = None,
        policy: str | None = None,
    ) -> AsyncGenerator[Delta]:
        worker, most = self.worker, stopping.max_tokens
        assert most is not None
        assert stopping.ignore_eos
        worker.asked.append(Asked(session, tuple(token_ids), most, timeout))
        history = 0 if session is None else worker.sessions[self.tenant, session]
        if session is None:
            worker.policies.add(policy)
        if worker.busy[session] > 0:
            raise SessionBusy("busy", code=grpc.StatusCode.FAILED_PRECONDITION, reason="SESSION_BUSY")
        turn = worker.turns[session]
        worker.turns[session] += 1
        worker.at_once += 1
        worker.most_at_once = max(worker.most_at_once, worker.at_once)
        index = 0
        try:
            script = worker.answer(session, turn, most)
            for place, part in enumerate(script):
                await asyncio.sleep(0)
                if isinstance(part, Exception):
                    raise part
                last = place == len(script) - 1
                cost = usage(len(token_ids), history, index + part)
                yield Delta(
                    "",
                    tuple(range(part)),
                    index,
                    finish_reason=FinishReason.LENGTH if last else None,
                    usage=cost if last else None,
                )
                index += part
            if session is not None:
                worker.sessions[self.tenant, session] += len(token_ids) + index
        except GeneratorExit:
            worker.busy[session] = worker.rollback
            raise
        finally:
            worker.at_once -= 1
