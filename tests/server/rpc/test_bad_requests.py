"""Every malformed request gets its documented answer, and a healthy stream beside them never notices."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest
from google.protobuf.message import Message

from apiary.v1 import session_pb2

from .answers import ask
from .at_limit import AT_LIMIT
from .bad_requests import BAD_REQUESTS, CREATE, STREAM, BadRequest, turn
from .fake_engine import FakeEngine


@pytest.fixture(autouse=True)
async def _known(engine: FakeEngine) -> None:
    engine.sessions.create("default", "known", None, None, None, {})


def test_table_is_large_and_its_names_differ() -> None:
    assert len(BAD_REQUESTS) >= 60
    assert len({one.name for one in BAD_REQUESTS}) == len(BAD_REQUESTS)
    assert not {one.code for one in BAD_REQUESTS} & {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}


@pytest.mark.parametrize("bad", BAD_REQUESTS, ids=lambda bad: bad.name)
async def test_answer(channel: grpc.aio.Channel, engine: FakeEngine, bad: BadRequest) -> None:
    answer = await ask(channel, bad.method, bad.payload, bad.metadata)
    assert answer.code is bad.code, answer.message
    assert answer.reason == bad.reason
    assert answer.details["ErrorInfo"].domain == "apiary"
    assert answer.responses == []
    assert answer.trailer_bytes < 8192
    if bad.field is not None:
        assert bad.field in answer.fields
    assert ("BadRequest" in answer.details) == (bad.reason in {"INVALID_FIELD", "FIELD_NOT_IMPLEMENTED"})
    assert ("ResourceInfo" in answer.details) == (
        bad.code in {grpc.StatusCode.NOT_FOUND, grpc.StatusCode.ALREADY_EXISTS}
    )
    assert engine.requests == []


@pytest.mark.parametrize("name", AT_LIMIT)
async def test_limit_itself_is_allowed(channel: grpc.aio.Channel, name: str) -> None:
    method, message = AT_LIMIT[name]
    answer = await ask(channel, method, message)
    assert answer.code is grpc.StatusCode.OK, answer.message
    assert answer.responses


async def test_healthy_stream_never_stalls(channel: grpc.aio.Channel, engine: FakeEngine) -> None:
    engine.count, engine.pace = 100_000, 0.005
    request = turn()
    request.stopping.max_tokens = 30_000
    healthy = channel.unary_stream(STREAM)(request.SerializeToString())
    gaps: list[float] = []

    async def read() -> None:
        last = time.monotonic()
        async for _ in healthy:
            now = time.monotonic()
            gaps.append(now - last)
            last = now

    reading = asyncio.create_task(read())
    for _ in range(2):
        await asyncio.gather(*(ask(channel, bad.method, bad.payload, bad.metadata) for bad in BAD_REQUESTS))
    healthy.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert len(gaps) > 10
    assert max(gaps) < 1.0


@pytest.mark.parametrize("size", [100, 20_000])
async def test_many_violations_fit_the_trailers(channel: grpc.aio.Channel, size: int) -> None:
    labels = {f"{i:03}" + "🐝" * size: "x" for i in range(64)}
    message: Message = session_pb2.CreateSessionRequest(session=session_pb2.Session(labels=labels))
    answer = await ask(channel, CREATE, message)
    assert answer.code is grpc.StatusCode.INVALID_ARGUMENT
    assert 1 <= len(answer.fields) < len(labels)
    assert answer.trailer_bytes < 8192
