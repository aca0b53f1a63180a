"""Turns and tokens over a real socket."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator

import grpc
import pytest

from apiary.v1 import generation_pb2 as pb
from apiary.v1.generation_pb2_grpc import GenerationServiceStub
from apiary_server import errors
from apiary_server.engine.request import Message, Messages, Text, TokenIds

from .answers import ask
from .bad_requests import GENERATE, STREAM, USER, chat
from .fake_engine import USAGE, FakeEngine

HI = pb.GenerateRequest(text="hi")


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> GenerationServiceStub:
    """The service."""
    return GenerationServiceStub(channel)


def _check_usage(usage: pb.Usage) -> None:
    assert (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) == (3, 2, 4)
    assert (usage.evicted_entries, usage.seed) == (USAGE.evicted_entries, USAGE.seed)
    times = usage.queue_time, usage.prefill_time, usage.decode_time
    assert [one.ToMilliseconds() for one in times] == [250, 500, 1500]


async def test_stream(stub: GenerationServiceStub, engine: FakeEngine) -> None:
    engine.pace = 0.05  # so that no deltas merge
    responses = [one async for one in stub.StreamGenerate(pb.GenerateRequest(text="hi", logprobs=1))]
    assert [one.text for one in responses] == ["t0 ", "t1 ", "t2 ", "t3 "]
    assert [list(one.token_ids) for one in responses] == [[0], [1], [2], [3]]
    assert [one.index for one in responses] == [0, 1, 2, 3]
    assert [one.logprobs[0].token_id for one in responses] == [0, 1, 2, 3]
    assert [(one.token_id, one.logprob) for one in responses[3].logprobs[0].top] == [(3, -0.5), (9, -2.0)]
    *early, last = responses
    assert {one.finish_reason for one in early} == {pb.FINISH_REASON_UNSPECIFIED}
    assert not any(one.HasField("usage") for one in early)
    assert last.finish_reason == pb.FINISH_REASON_LENGTH
    _check_usage(last.usage)


async def test_whole_answer(stub: GenerationServiceStub) -> None:
    whole = await stub.Generate(pb.GenerateRequest(text="hi", logprobs=1))
    assert whole.text == "t0 t1 t2 t3 "
    assert list(whole.token_ids) == [0, 1, 2, 3]
    assert [one.token_id for one in whole.logprobs] == [0, 1, 2, 3]
    assert whole.finish_reason == pb.FINISH_REASON_LENGTH
    _check_usage(whole.usage)


async def test_first_delta_comes_with_the_first_token(
    stub: GenerationServiceStub, engine: FakeEngine
) -> None:
    engine.pace, engine.count = 0.2, 5
    began = time.monotonic()
    call = stub.StreamGenerate(HI)
    assert (await call.read()).text == "t0 "
    assert time.monotonic() - began < 0.9  # the whole answer takes a second
    call.cancel()


async def test_headers_come_before_the_first_token(stub: GenerationServiceStub, engine: FakeEngine) -> None:
    engine.pace = 5
    call = stub.StreamGenerate(HI)
    await asyncio.wait_for(call.initial_metadata(), timeout=2)
    call.cancel()


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ({"text": "hi"}, Text(text="hi")),
        ({"token_ids": pb.TokenIds(ids=[3, 1])}, TokenIds(ids=(3, 1))),
        ({"messages": chat((USER, "hi"))}, Messages(messages=(Message(role="user", content="hi"),))),
    ],
)
async def test_inputs(
    stub: GenerationServiceStub, engine: FakeEngine, field: dict[str, object], expected: object
) -> None:
    await stub.Generate(pb.GenerateRequest(**field))
    assert engine.requests[0].input == expected


async def test_metadata_and_deadline_reach_the_engine(
    stub: GenerationServiceStub, engine: FakeEngine
) -> None:
    metadata = (("x-apiary-tenant", "bees"), ("traceparent", "00-aa-bb-01"))
    await stub.Generate(HI, metadata=metadata, timeout=30)
    await stub.Generate(HI)
    timed, untimed = engine.requests
    assert timed.tenant == "bees"
    assert timed.deadline is not None
    assert 25 < timed.deadline - time.monotonic() <= 31  # the caller's clock is another
    assert timed.trace.headers == {"traceparent": "00-aa-bb-01"}
    assert (untimed.tenant, untimed.deadline) == ("default", None)


@pytest.mark.parametrize("method", [STREAM, GENERATE])
async def test_refused_turns(channel: grpc.aio.Channel, engine: FakeEngine, method: str) -> None:
    engine.refusal = errors.QueueFull("the queue is full", retry_after=2.5)
    answer = await ask(channel, method, HI)
    assert (answer.code, answer.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert answer.details["RetryInfo"].retry_delay.ToTimedelta().total_seconds() == 2.5


@pytest.mark.parametrize("method", [STREAM, GENERATE])
async def test_a_full_queue_refuses_before_anything_is_done(
    channel: grpc.aio.Channel, engine: FakeEngine, method: str
) -> None:
    engine.full = True
    answer = await ask(channel, method, pb.GenerateRequest())  # which is wrong, too
    assert (answer.code, answer.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert answer.details["RetryInfo"].retry_delay.ToTimedelta().total_seconds() == 2.5


@pytest.mark.parametrize("method", [STREAM, GENERATE])
async def test_a_malformed_turn_gives_its_place_back(
    channel: grpc.aio.Channel, engine: FakeEngine, method: str
) -> None:
    answer = await ask(channel, method, pb.GenerateRequest())
    assert answer.code is grpc.StatusCode.INVALID_ARGUMENT
    assert len(engine.places) == 0


async def test_a_caller_that_leaves_before_a_thread_is_free_gives_its_place_back(
    stub: GenerationServiceStub, engine: FakeEngine
) -> None:
    engine.admission = 0.3
    calls = [stub.StreamGenerate(HI) for _ in range(40)]  # more than there are threads
    async with asyncio.timeout(10):
        while len(engine.places) < 10:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        for call in calls:
            call.cancel()
        while engine.places:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_refusal_leaves_the_call_retriable(stub: GenerationServiceStub, engine: FakeEngine) -> None:
    engine.refusal = errors.Draining("draining", retry_after=1)
    call = stub.StreamGenerate(HI)
    assert await call.code() is grpc.StatusCode.UNAVAILABLE
    assert not list(await call.initial_metadata() or ())


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (errors.ReaderStalled("stalled"), grpc.StatusCode.ABORTED),
        (errors.Internal("abc"), grpc.StatusCode.INTERNAL),
        (errors.DeadlineExceeded("late"), grpc.StatusCode.DEADLINE_EXCEEDED),
        (errors.Cancelled("deleted"), grpc.StatusCode.CANCELLED),
    ],
)
async def test_a_turn_that_fails_midway(
    channel: grpc.aio.Channel, engine: FakeEngine, failure: errors.ApiaryError, code: grpc.StatusCode
) -> None:
    engine.failure, engine.pace = failure, 0.05
    answer = await ask(channel, STREAM, HI)
    assert answer.code is code
    assert answer.message == failure.message
    assert len(answer.responses) == 1
    assert (await ask(channel, GENERATE, HI)).code is code


async def test_a_busy_session(channel: grpc.aio.Channel, engine: FakeEngine) -> None:
    engine.sessions.create("default", "a", None, None, None, {})
    engine.pace, engine.count = 0.05, 1000
    request = pb.GenerateRequest(text="hi", session="sessions/a")
    first = GenerationServiceStub(channel).StreamGenerate(request)
    await first.read()
    answer = await ask(channel, STREAM, request)
    assert (answer.code, answer.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "SESSION_BUSY")
    first.cancel()


async def test_a_session_that_is_busy_for_a_moment(
    stub: GenerationServiceStub, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its caller left a stream, asked again, and was here before the news that it had left."""
    begin, refused = engine.open, []

    def busy_once(*given: object) -> object:
        if not refused:
            refused.append(given)
            given[2].release()  # type: ignore[attr-defined]  # the place, as the engine does
            raise errors.SessionBusy("sessions/a has a turn in flight")
        return begin(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "open", busy_once)
    assert (await stub.Generate(HI)).text == "t0 t1 t2 t3 "
    assert len(refused) == 1


@pytest.mark.parametrize("method", ["StreamGenerate", "Generate"])
async def test_cancelling_drops_the_turn(
    stub: GenerationServiceStub, engine: FakeEngine, method: str
) -> None:
    engine.pace, engine.count = 0.02, 10_000
    call = getattr(stub, method)(HI)
    await asyncio.to_thread(engine.opening.wait, 5)
    await asyncio.sleep(0.1)
    assert call.cancel()
    assert await asyncio.to_thread(engine.dropped.wait, 2)


async def test_leaving_while_the_turn_is_opened_drops_it(
    stub: GenerationServiceStub, engine: FakeEngine
) -> None:
    engine.admission, engine.count, engine.pace = 0.4, 10_000, 0.01
    call = stub.StreamGenerate(HI)
    await asyncio.to_thread(engine.opening.wait, 5)
    call.cancel()
    assert await asyncio.to_thread(engine.dropped.wait, 2)


async def test_a_refusal_that_nobody_is_left_to_hear_is_no_error(
    stub: GenerationServiceStub, engine: FakeEngine
) -> None:
    reported: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    engine.admission, engine.refusal = 0.3, errors.InvalidField([("text", "too long")])
    call = stub.StreamGenerate(HI)
    await asyncio.to_thread(engine.opening.wait, 5)
    call.cancel()
    await asyncio.sleep(0.6)
    gc.collect()  # asyncio reports when the task is collected
    assert not reported


async def test_a_deadline_drops_the_turn(stub: GenerationServiceStub, engine: FakeEngine) -> None:
    engine.pace, engine.count = 0.02, 10_000
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(HI, timeout=0.3)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert await asyncio.to_thread(engine.dropped.wait, 2)


async def test_a_channel_that_closes_drops_its_turns(app: object, engine: FakeEngine) -> None:
    engine.pace, engine.count = 0.02, 10_000
    async with grpc.aio.insecure_channel(app.address) as leaving:
        await GenerationServiceStub(leaving).StreamGenerate(HI).read()
    assert await asyncio.to_thread(engine.dropped.wait, 2)


async def test_streams_interleave_and_one_that_ends_disturbs_none(
    stub: GenerationServiceStub, engine: FakeEngine
) -> None:
    engine.pace, engine.count = 0.01, 30
    calls = [stub.StreamGenerate(HI) for _ in range(32)]
    answers = [aiter(call) for call in calls]
    firsts = await asyncio.gather(*(anext(answer) for answer in answers))
    assert {first.text.split()[0] for first in firsts} == {"t0"}
    calls[0].cancel()

    async def rest(answer: AsyncIterator[pb.StreamGenerateResponse]) -> list[int]:
        return [token async for response in answer for token in response.token_ids]

    tails = await asyncio.gather(*(rest(answer) for answer in answers[1:]))
    for first, tail in zip(firsts[1:], tails, strict=True):
        assert [*first.token_ids, *tail] == list(range(30))


async def test_tokens(stub: GenerationServiceStub) -> None:
    assert list((await stub.Tokenize(pb.TokenizeRequest(text="ab"))).token_ids) == [97, 98]
    rendered = await stub.Tokenize(pb.TokenizeRequest(messages=chat((USER, "b"))))
    assert list(rendered.token_ids) == [98]
    assert (await stub.Detokenize(pb.DetokenizeRequest(token_ids=[3, 4]))).text == "3 4"
