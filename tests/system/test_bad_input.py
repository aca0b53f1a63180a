"""Malformed and absurd requests: each has its documented answer, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf.message import Message

from apiary_client import Client
from tests.server.rpc.answers import Answer, ask
from tests.server.rpc.at_limit import AT_LIMIT
from tests.server.rpc.bad_requests import BAD_REQUESTS, BadRequest

from .reading import check_same, tokens
from .worker import Worker, environment

ROOT = Path(__file__).parents[2]
AT_ONCE = 8
ROUNDS = 3
LONGEST_GAP = 1.5  # seconds between two tokens of a healthy stream, on a machine that is busy otherwise too
PROMPT, ANSWER = "Hum along, please.", 100


@pytest.fixture
async def channel(worker: Worker) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(worker.target) as connected:
        yield connected


@pytest.fixture
def healthy(worker: Worker) -> Iterator[subprocess.Popen[str]]:
    """A reader that streams all the time."""
    command = [sys.executable, "-m", "tests.system.healthy_reader", worker.target, PROMPT, str(ANSWER)]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


async def test_every_answer_is_as_documented_and_a_healthy_stream_never_stalls(
    client: Client, channel: grpc.aio.Channel, healthy: subprocess.Popen[str]
) -> None:
    requests = BAD_REQUESTS * ROUNDS
    payloads = [_bytes(bad.payload) for bad in requests]
    client.create_session("known")
    known = client.get_session("known")
    assert healthy.stdout is not None
    assert await asyncio.to_thread(healthy.stdout.readline) == "\n"
    places = asyncio.Semaphore(AT_ONCE)

    async def send(bad: BadRequest, payload: bytes) -> Answer:
        async with places:
            return await ask(channel, bad.method, payload, bad.metadata)

    answers = await asyncio.gather(*map(send, requests, payloads))
    healthy.terminate()
    readings = [json.loads(line) for line in healthy.communicate(timeout=60)[0].splitlines()]
    assert healthy.returncode == 0
    assert [
        f"{bad.name}: {wrong}"
        for bad, answer in zip(requests, answers, strict=True)
        if (wrong := _wrong(bad, answer))
    ] == []
    assert client.get_session("known") == known
    assert [session.id for session in client.list_sessions()] == ["known"]
    alone = client.generate(PROMPT, stopping=tokens(ANSWER), logprobs=2, timeout=60)
    for reading in readings:
        check_same(tuple(reading["token_ids"]), alone)
    gaps = [reading["gap"] for reading in readings]
    print(f"longest gap {max(gaps):.3f} s in {len(gaps)} answers")
    assert max(gaps) < LONGEST_GAP


def _bytes(payload: bytes | Message) -> bytes:
    return payload if isinstance(payload, bytes) else payload.SerializeToString()


def _wrong(bad: BadRequest, answer: Answer) -> str:
    """What is wrong with the answer; "" if nothing."""
    if answer.code is not bad.code or answer.reason != bad.reason:
        return f"{answer.code.name} {answer.reason} ({answer.message}), not {bad.code.name} {bad.reason}"
    if answer.responses:
        return "it was answered before it was refused"
    if bad.field is not None and bad.field not in answer.fields:
        return f"names the fields {answer.fields}, not {bad.field}"
    if "ErrorInfo" not in answer.details:
        return "has no ErrorInfo"
    if bad.field is not None and "BadRequest" not in answer.details:
        return "has no BadRequest"
    if bad.code is grpc.StatusCode.NOT_FOUND and "ResourceInfo" not in answer.details:
        return "has no ResourceInfo"
    return ""


@pytest.mark.parametrize(
    "name", sorted(AT_LIMIT.keys() - {"sampling, high"})
)  # which names tokens that this model lacks
async def test_what_is_just_allowed_is_served(client: Client, channel: grpc.aio.Channel, name: str) -> None:
    client.create_session("known")
    method, message = AT_LIMIT[name]
    answer = await ask(channel, method, message)
    assert answer.code is grpc.StatusCode.OK, answer.message
