"""Tokens come when they exist, to many readers at once, and no reader's fate is another's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from apiary_client import Capacity, Client, FinishReason, aio

from .reading import Reader, Reading, check_same, tokens
from .worker import Worker

STREAMS = 32
ANSWER = 400  # tokens: enough for all streams to begin before the first one ends
STEPS_TO_NOTICE = (
    60  # the others' tokens, while a cancel travels to the worker and its effect back to the test
)


def test_first_delta_comes_while_the_turn_runs(client: Client) -> None:
    stream = client.stream("Tell me about bees.", stopping=tokens(30_000), timeout=60)
    assert next(stream).index == 0
    for _ in range(50):  # the reader sees the decoding happen, not its result
        next(stream)
    assert client.get_capacity().running_turns == 1
    stream.close()


def test_all_but_the_last_delta_are_pieces(client: Client) -> None:
    reading = Reading()
    for delta in client.stream("Tell me about bees.", stopping=tokens(600), timeout=60):
        reading.take(delta)
    assert all(delta.finish_reason is None and delta.usage is None for delta in reading.deltas[:-1])
    assert reading.deltas[-1].finish_reason is FinishReason.LENGTH
    assert len(reading.deltas) > 50
    assert len(reading.token_ids) == reading.usage.completion_tokens == 600


def test_deltas_are_numbered_and_never_split_a_character(client: Client) -> None:
    deltas = list(client.stream("Grüße, 蜂!", stopping=tokens(200), timeout=60))
    place = 0
    for delta in deltas:
        assert delta.index == place
        place += len(delta.token_ids)
    whole = client.generate("Grüße, 蜂!", stopping=tokens(200), logprobs=2, timeout=60)
    check_same(tuple(token for delta in deltas for token in delta.token_ids), whole)
    assert "".join(delta.text for delta in deltas) == client.detokenize(whole.token_ids)


@dataclass
class Swarm:
    """Many streams that run at once; `tasks[i]` reads into `readings[i]`."""

    client: aio.Client
    readings: list[Reading]
    tasks: list[asyncio.Task[None]]

    async def all_begun(self) -> None:
        """Wait until each has its first delta."""
        async with asyncio.timeout(60):
            while not all(reading.deltas for reading in self.readings):  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    async def end(self) -> None:
        """Wait for the ends of all."""
        async with asyncio.timeout(90):
            await asyncio.gather(*self.tasks, return_exceptions=True)


@pytest.fixture
async def swarm(worker: Worker) -> AsyncIterator[Swarm]:
    async with aio.Client(worker.target) as client:
        readings = [Reading() for _ in range(STREAMS)]
        tasks = [
            asyncio.create_task(
                reading.follow(client.stream(_prompt(place), stopping=tokens(ANSWER), timeout=90))
            )
            for place, reading in enumerate(readings)
        ]
        yield Swarm(client, readings, tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _prompt(place: int) -> str:
    return f"Bee number {place % 8}, report."


def _check_alone(client: Client, readings: dict[int, Reading]) -> None:
    """Check that each stream ended, with what the worker answers when it has nothing else to do."""
    alone = {
        prompt: client.generate(prompt, stopping=tokens(ANSWER), logprobs=2, timeout=60)
        for prompt in {_prompt(place) for place in readings}
    }
    for place, reading in readings.items():
        assert reading.error is None
        assert reading.usage.completion_tokens == ANSWER
        check_same(reading.token_ids, alone[_prompt(place)])


async def test_32_streams_interleave(swarm: Swarm, client: Client) -> None:
    await swarm.end()
    # every stream began before any ended ...
    assert max(reading.times[0] for reading in swarm.readings) < min(
        reading.times[-1] for reading in swarm.readings
    )
    # ... and went on while the others did: between a stream's first and last delta, each other one moved
    for one in swarm.readings:
        for other in swarm.readings:
            inside = [time for time in other.times if one.times[0] < time < one.times[-1]]
            assert len(inside) > len(other.times) / 4
    await asyncio.to_thread(_check_alone, client, dict(enumerate(swarm.readings)))


async def test_a_cancelled_stream_frees_its_place_and_disturbs_no_other(swarm: Swarm, client: Client) -> None:
    await swarm.all_begun()
    before = await swarm.client.get_capacity()
    assert before.running_turns == STREAMS
    assert before.used_bytes == _with_turns(before, STREAMS)
    at_cancel = max(len(reading.token_ids) for reading in swarm.readings)
    swarm.tasks[5].cancel()
    while (capacity := await swarm.client.get_capacity()).running_turns == STREAMS:
        assert not all(task.done() for task in swarm.tasks), "its place was freed by the end alone"
    steps = max(len(reading.token_ids) for reading in swarm.readings) - at_cancel
    assert steps < STEPS_TO_NOTICE
    assert capacity.used_bytes == _with_turns(capacity, STREAMS - 1)
    await swarm.end()
    assert swarm.tasks[5].cancelled()
    others = dict(enumerate(swarm.readings))
    assert 0 < len(others.pop(5).token_ids) < ANSWER
    await asyncio.to_thread(_check_alone, client, others)


def _with_turns(capacity: Capacity, turns: int) -> int:
    """The bytes in use when just this many one-shot turns hold a slot each."""
    return capacity.workspaces * capacity.workspace_bytes + turns * capacity.slot_bytes


def test_a_long_prompt_does_not_hold_up_a_stream(client: Client) -> None:
    running = Reader(client.stream("Count the flowers.", stopping=tokens(400), timeout=60))
    assert running.begun.wait(30)
    long = client.generate(text="pollen " * 1500, stopping=tokens(4), timeout=60)
    assert long.usage.prompt_tokens == 1500 * 7  # ten times what the model was trained on
    reading = running.end()
    assert reading.error is None
    during = [one for one in reading.times if one > reading.times[0]]
    assert len(during) > 100
    assert reading.longest_gap < 2.0
