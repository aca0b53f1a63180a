"""A reader that is slow gets everything; one that stops reading is told so, and nobody waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from apiary.v1 import generation_pb2 as pb
from apiary.v1.generation_pb2_grpc import GenerationServiceStub
from apiary_client import Client, State, errors

from .reading import Reader, check_same, tokens
from .worker import SMALL, Worker, empty, settled, until

STALL_LIMIT = 2.0
BUFFER = 16  # tokens
# No window beyond a few messages, so that what is not read stays in the worker.
NARROW = [("grpc.http2.lookahead_bytes", 64), ("grpc.http2.bdp_probe", 0)]


@pytest.fixture(scope="module")
def impatient_worker(start_worker: Callable[..., Worker], tiny_model: Path) -> Worker:
    """A worker that soon gives up on a reader."""
    limits = ("--stall-limit", str(STALL_LIMIT), "--stream-tokens", str(BUFFER))
    return start_worker("--model", str(tiny_model), *SMALL, "--cache-budget", "1MiB", *limits)


@pytest.fixture
def client(impatient_worker: Worker) -> Iterator[Client]:
    with impatient_worker.client() as connected:
        yield connected
        assert until(lambda: empty(connected.get_capacity()), 20), connected.get_capacity()


@pytest.fixture
def narrow(impatient_worker: Worker) -> Iterator[GenerationServiceStub]:
    """Reads a message only when it is asked for."""
    with grpc.insecure_channel(impatient_worker.target, NARROW) as channel:
        yield GenerationServiceStub(channel)


def _turn(content: str, count: int, session: str = "") -> pb.GenerateRequest:
    message = pb.ChatMessage(role=pb.ChatMessage.ROLE_USER, content=content)
    return pb.GenerateRequest(
        session=session,
        messages=pb.ChatMessages(messages=[message]),
        stopping=pb.Stopping(max_tokens=count, ignore_eos=True),
    )


def test_a_reader_that_stops_reading(client: Client, narrow: GenerationServiceStub) -> None:
    session = client.create_session()
    client.generate("Good morning.", session=session, stopping=tokens(30), timeout=30)
    before = client.get_session(session)

    stalled = narrow.StreamGenerate(_turn("Go on for ever.", 30_000, session.name), timeout=60)
    assert next(stalled).token_ids
    stopped = time.monotonic()
    # it delays nobody: while it stalls, another answer keeps coming
    beside = Reader(client.stream("What do bees eat?", stopping=tokens(800), timeout=60))
    after = settled(client, session)
    assert time.monotonic() - stopped > STALL_LIMIT / 2
    assert len(beside.reading.deltas) > 100
    assert after == before
    assert before.turn_count == 1
    reading = beside.end()
    assert reading.error is None
    assert len(reading.token_ids) == 800
    assert reading.longest_gap < STALL_LIMIT

    # it was rolled back while nobody read; whoever reads again is told
    with pytest.raises(grpc.RpcError) as caught:
        list(stalled)
    error = errors.restore(caught.value)
    assert isinstance(error, errors.ReaderStalled)
    assert (error.code, error.reason) == (grpc.StatusCode.ABORTED, "READER_STALLED")

    assert client.generate("Go on.", session=session, stopping=tokens(4), timeout=30).usage.cached_tokens
    assert client.get_session(session).turn_count == 2
    client.delete_session(session)


def test_a_reader_that_stops_reading_and_leaves(
    client: Client, impatient_worker: Worker, narrow: GenerationServiceStub
) -> None:
    stalled = narrow.StreamGenerate(_turn("Go on for ever.", 30_000), timeout=60)
    next(stalled)
    assert client.get_capacity().running_turns == 1
    stalled.cancel()
    assert until(lambda: client.get_capacity().running_turns == 0, 10)


def test_a_slow_reader_gets_everything(client: Client, narrow: GenerationServiceStub) -> None:
    session = client.create_session()
    slow = narrow.StreamGenerate(_turn("Tell me a story.", 300, session.name), timeout=60)
    text, sizes = "", []
    for message in slow:
        text += message.text
        sizes.append(len(message.token_ids))
        busy = client.get_session(session).state is State.BUSY
        time.sleep(0.06)  # it is slow
    assert sum(sizes) == 300
    assert not busy
    # the turn ran ahead of its reader no further than its buffer, in which deltas merge
    assert BUFFER <= max(sizes) < 2 * BUFFER
    assert len(sizes) < 100
    alone = client.generate("Tell me a story.", stopping=tokens(300), logprobs=2, timeout=30)
    assert text == alone.text
    assert client.get_session(session).turn_count == 1
    client.delete_session(session)


def test_an_answer_beside_a_slow_reader_is_as_alone(client: Client, narrow: GenerationServiceStub) -> None:
    slow = narrow.StreamGenerate(_turn("Slowly now.", 30_000), timeout=60)
    next(slow)
    beside = Reader(client.stream("Quickly now.", stopping=tokens(150), timeout=60)).end()
    slow.cancel()
    check_same(
        beside.token_ids, client.generate("Quickly now.", stopping=tokens(150), logprobs=2, timeout=30)
    )
