"""How turns, sessions and the worker itself end."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub

from apiary_client import Client, Session, errors

from .reading import Reader, tokens
from .worker import SMALL, Worker, environment, settled, until

ENDLESS = tokens(30_000)

# The command line cannot ask for an answer that goes on at its end, and one that ends by itself may do so
# before the signal comes.
READER = """
import sys
from apiary_client import Client, Stopping
endless = Stopping(max_tokens=30_000, ignore_eos=True)
with Client(sys.argv[1]) as client:
    for _ in client.stream("Go on.", session=sys.argv[2], stopping=endless):
        print("one more", flush=True)
"""


@pytest.fixture
def session(client: Client) -> Session:
    """A session of one turn, as it is after it."""
    client.create_session("talk")
    client.generate("Good morning.", session="talk", stopping=tokens(24), timeout=30)
    return client.get_session("talk")


def _check_untouched(client: Client, session: Session) -> None:
    """The session is as it was, and its next turn goes on from there as if nothing had been tried."""
    assert settled(client, session) == session
    twin = client.create_session()
    client.generate("Good morning.", session=twin, stopping=tokens(24), timeout=30)
    answers = [
        client.generate("And then?", session=one, stopping=tokens(24), timeout=30) for one in (session, twin)
    ]
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[0].usage.cached_tokens == answers[1].usage.cached_tokens > 0


def test_deadline(client: Client, session: Session) -> None:
    began = time.monotonic()
    reader = Reader(client.stream("Go on.", session=session, stopping=ENDLESS, timeout=0.2))
    error = reader.end().error
    assert time.monotonic() - began < 10
    assert isinstance(error, errors.DeadlineExceeded)
    assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert until(lambda: client.get_capacity().running_turns == 0, 5)
    _check_untouched(client, session)


def test_leaving_a_stream_early(client: Client, session: Session) -> None:
    for _ in range(3):
        stream = client.stream("Go on.", session=session, stopping=ENDLESS, timeout=60)
        next(stream)
        stream.close()
    _check_untouched(client, session)


def test_a_client_that_is_killed(client: Client, session: Session, worker: Worker, tmp_path: Path) -> None:
    answer = tmp_path / "answer"
    with answer.open("wb") as out:
        victim = subprocess.Popen(
            [sys.executable, "-c", READER, worker.target, session.id], env=environment(), stdout=out
        )
    try:
        assert until(lambda: answer.stat().st_size > 100, 30)
        assert client.get_capacity().running_turns == 1
    finally:
        victim.kill()
        victim.wait(10)
    assert until(lambda: client.get_capacity().running_turns == 0, 10)
    _check_untouched(client, session)


def test_a_session_that_is_deleted_while_it_answers(client: Client, session: Session) -> None:
    reader = Reader(client.stream("Go on.", session=session, stopping=ENDLESS, timeout=60))
    assert reader.begun.wait(30)
    client.delete_session(session)
    capacity = client.get_capacity()
    assert (capacity.sessions, capacity.running_turns) == (0, 0)
    assert capacity.used_bytes == capacity.workspaces * capacity.workspace_bytes
    error = reader.end().error
    assert isinstance(error, errors.Cancelled)
    assert error.reason == "CANCELLED"
    assert "deleted" in error.message
    with pytest.raises(errors.SessionNotFound):
        client.get_session(session)
    assert client.create_session(session.id).turn_count == 0


def test_a_busy_session_refuses_a_second_turn(client: Client, session: Session) -> None:
    reader = Reader(client.stream("Go on.", session=session, stopping=tokens(2000), timeout=60))
    assert reader.begun.wait(30)
    with pytest.raises(errors.SessionBusy) as caught:
        client.generate("And?", session=session, timeout=10)
    assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION
    assert reader.end().usage.completion_tokens == 2000
    assert client.get_session(session).turn_count == 2


def test_expiry(client: Client) -> None:
    client.create_session("brief", ttl=1)
    client.generate("Hello.", session="brief", stopping=tokens(4), timeout=30)
    began, brief = time.time(), client.get_session("brief")
    assert brief.expire_time is not None
    assert brief.update_time is not None
    assert (brief.expire_time - brief.update_time).total_seconds() == pytest.approx(1, abs=1e-3)

    def gone() -> bool:
        try:
            client.get_session("brief")
        except errors.SessionNotFound:
            return True
        return False

    assert until(gone, 10)
    assert brief.expire_time.timestamp() <= time.time() < began + 10
    assert list(client.list_sessions()) == []
    for attempt in (client.generate, client.stream):
        with pytest.raises(errors.SessionNotFound):
            list(attempt("Hello?", session="brief", timeout=10))  # type: ignore[arg-type]
    assert until(lambda: client.get_capacity().resident_sessions == 0, 5)


def test_tenants_cannot_see_each_other(worker: Worker, client: Client, session: Session) -> None:
    with worker.client(tenant="wasps") as other:
        for attempt in (
            lambda: other.get_session(session),
            lambda: other.delete_session(session),
            lambda: other.generate("Hello?", session=session, timeout=10),
            lambda: next(other.stream("Hello?", session=session, timeout=10)),
        ):
            with pytest.raises(errors.SessionNotFound) as caught:
                attempt()
            assert caught.value.resource == session.name
        assert list(other.list_sessions()) == []
        namesake = other.create_session(session.id)  # a name is taken for one tenant alone
        try:
            assert namesake.turn_count == 0
            assert [one.turn_count for one in other.list_sessions()] == [0]
            assert [one.turn_count for one in client.list_sessions()] == [1]
        finally:
            other.delete_session(namesake)
    assert client.get_session(session) == session


def test_sigterm_drains(start_worker: Callable[..., Worker], tiny_model: Path) -> None:
    grace = 5.0
    worker = start_worker("--model", str(tiny_model), *SMALL, "--drain-grace", str(grace))
    with worker.client() as client, grpc.insecure_channel(worker.target) as channel:
        health = HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
        assert next(health).status == health_pb2.HealthCheckResponse.SERVING
        short = Reader(client.stream("Good bye.", stopping=tokens(600), timeout=60))
        endless = Reader(client.stream("Never end.", stopping=ENDLESS, timeout=60))
        assert short.begun.wait(30)
        assert endless.begun.wait(30)
        signalled = time.monotonic()
        worker.signal(signal.SIGTERM)
        assert next(health).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(errors.Draining) as caught:
            client.generate("One more?", timeout=10)
        assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        assert caught.value.retry_after == 1.0
        finished = short.end()
        assert finished.error is None
        assert len(finished.token_ids) == 600
        assert finished.times[-1] > signalled
        cut = endless.end()
        assert isinstance(cut.error, errors.Draining)
        assert grace * 0.9 < time.monotonic() - signalled < grace + 10
        health.cancel()
    assert worker.wait() == 0
    assert '"drained"' in worker.stderr
