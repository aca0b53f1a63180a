"""A full queue is told at once, whatever the engine and the threads before it do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import grpc
import pytest
import pytest_asyncio
import torch

from apiary_client import aio, errors
from apiary_client.types import Stopping
from apiary_server.engine.engine import Engine
from apiary_server.rpc.app import App
from apiary_server.settings import Settings

STEP = 0.6  # seconds, and twice as long for a tokeniser
SOON = 0.1  # seconds in which a refusal must come
RUNNING, QUEUE = 2, 4


@pytest_asyncio.fixture
async def busy(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Engine, aio.Client]]:
    """A served engine over the tiny model, with long steps and a slow tokeniser."""
    engine = make_engine(max_running=RUNNING, queue_limit=QUEUE)
    run, encode = engine._loop.runner.run, engine._door.tokenizer.encode
    matrix = torch.rand(256, 256)

    def long_step(*args: Any) -> torch.Tensor:
        end = time.monotonic() + STEP
        while time.monotonic() < end:  # computes, as a step does
            matrix @ matrix
        return run(*args)

    def slow_encode(*args: Any, **options: Any) -> list[int]:
        time.sleep(2 * STEP)
        return encode(*args, **options)

    monkeypatch.setattr(engine._loop.runner, "run", long_step)
    monkeypatch.setattr(engine._door.tokenizer, "encode", slow_encode)
    app = App(engine, Settings(listen="127.0.0.1:0"))
    await app.start()
    async with aio.Client(app.address) as client:
        yield engine, client
    await app.stop(0)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for it, for so long that it must come."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_full_queue_is_told_while_steps_are_long_and_threads_are_busy(
    busy: tuple[Engine, aio.Client],
) -> None:
    engine, client = busy
    stopping = Stopping(max_tokens=1000, ignore_eos=True)

    async def turn() -> None:
        with suppress(errors.ApiaryError):
            await client.generate(token_ids=[5, 6], stopping=stopping)

    async def tokenize() -> None:
        with suppress(errors.ApiaryError):
            await client.tokenize(text="hello")

    tasks = [asyncio.create_task(turn()) for _ in range(RUNNING)]
    await until(lambda: engine.capacity().running_turns == RUNNING)
    tasks += [asyncio.create_task(turn()) for _ in range(QUEUE)]
    await until(lambda: engine.capacity().queued_turns == QUEUE)
    tasks += [asyncio.create_task(tokenize()) for _ in range(64)]  # more than there are threads
    await asyncio.sleep(0.1)
    took = []
    for _ in range(30):
        began = time.perf_counter()
        with pytest.raises(errors.QueueFull) as refusal:
            await client.generate("hello", stopping=stopping)
        took.append(time.perf_counter() - began)
        assert refusal.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refusal.value.retry_after is not None
        assert refusal.value.retry_after > 0
        await asyncio.sleep(0.02)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    took.sort()
    assert took[len(took) // 2] < SOON / 4
    assert took[-3] < SOON, "two may fall victim to a busy machine"
