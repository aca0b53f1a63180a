"""The asyncio client against a fake worker: what differs from the synchronous one."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from apiary_client import FinishReason, State, aio
from apiary_client.errors import DeadlineExceeded, SessionNotFound, Unavailable

from .fake_worker import FakeWorker


async def cancelled(worker: FakeWorker) -> bool:
    return await asyncio.to_thread(worker.cancelled.wait, 5)


async def test_a_conversation(aclient: aio.Client) -> None:
    session = await aclient.create_session("work", policy="full")
    assert session.state is State.EMPTY
    for turn in (1, 2):
        deltas = [delta async for delta in aclient.stream("go on", session=session)]
        assert "".join(delta.text for delta in deltas) == f"turn {turn}: go on"
        assert [delta.finish_reason for delta in deltas] == [None] * 4 + [FinishReason.STOP]
    assert (await aclient.get_session(session)).turn_count == 2
    assert (await aclient.generate("so?", session="work")).text == "turn 3: so?"
    assert (await aclient.update_session(session, policy="buzz")).policy == "buzz"
    assert (await aclient.rewind_session(session, 1)).turn_count == 1
    assert (await aclient.fork_session(session, "again")).name == "sessions/again"
    chunks = [chunk.data async for chunk in aclient.export_session(session)]
    assert (await aclient.import_session(chunks, "there")).name == "sessions/there"
    kept = await aclient.get_cache_map(session, full=True, layers=[1])
    assert kept.layers[0].heads[0].positions == (0, 2, 5, 9)
    await aclient.delete_session(session)
    with pytest.raises(SessionNotFound):
        await aclient.get_session(session)


async def test_streams_run_side_by_side(aclient: aio.Client) -> None:
    async def say(text: str) -> str:
        return "".join([delta.text async for delta in aclient.stream(text)])

    texts = [f"number {number}" for number in range(6)]
    assert await asyncio.gather(*map(say, texts)) == [f"turn 1: {text}" for text in texts]


async def test_leaving_the_loop_cancels_the_call(aclient: aio.Client, worker: FakeWorker) -> None:
    async for delta in aclient.stream("slow please"):
        assert delta.text == "turn"
        break
    assert await cancelled(worker)


async def test_closing_the_iterator_cancels_the_call(aclient: aio.Client, worker: FakeWorker) -> None:
    async with aclosing(aclient.stream("slow please")) as deltas:
        assert (await anext(deltas)).text == "turn"
        assert not worker.cancelled.is_set()
    assert await cancelled(worker)


@pytest.mark.parametrize("method", ["generate", "stream"])
async def test_cancelling_the_task_cancels_the_call(
    aclient: aio.Client, worker: FakeWorker, method: str
) -> None:
    async def ask() -> None:
        if method == "generate":
            await aclient.generate("slow please")
        else:
            async for _ in aclient.stream("slow please"):
                pass

    task = asyncio.create_task(ask())
    assert await asyncio.to_thread(worker.asked.wait, 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await cancelled(worker)


async def test_a_deadline_ends_a_stream(aclient: aio.Client) -> None:
    with pytest.raises(DeadlineExceeded):
        async for _ in aclient.stream("slow please", timeout=0.3):
            pass


async def test_a_deadline_ends_a_call(aclient: aio.Client) -> None:
    with pytest.raises(DeadlineExceeded):
        await aclient.generate("slow please", timeout=0.3)


async def test_a_bad_stream_is_refused_before_it_starts(aclient: aio.Client) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        aclient.stream()


async def test_tokens_and_back(aclient: aio.Client) -> None:
    ids = await aclient.tokenize(text="buzz")
    assert await aclient.detokenize(ids) == "buzz"


async def test_the_list_turns_its_pages(aclient: aio.Client, worker: FakeWorker) -> None:
    for number in range(5):
        await aclient.create_session(f"s{number}")
    assert [session.id async for session in aclient.list_sessions()] == ["s0", "s1", "s2", "s3", "s4"]
    assert worker.calls["ListSessionsRequest"] == 3


async def test_the_model_and_its_capacity(aclient: aio.Client) -> None:
    assert (await aclient.get_model()).name == "models/fake"
    assert (await aclient.get_capacity()).budget_bytes == 2**30


async def test_a_worker_that_is_gone_is_unavailable(aclient: aio.Client, worker: FakeWorker) -> None:
    await aclient.get_model()
    worker.stop()
    with pytest.raises(Unavailable):
        await aclient.generate("hello", timeout=10)
