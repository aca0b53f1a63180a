"""What every store keeps to: what was written is there, whoever reads it, or the writer is told."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from apiary_server.sessions.files import SnapshotFiles
from apiary_server.sessions.sqlite import SqliteStore
from apiary_server.sessions.store import (
    Change,
    SnapshotStore,
    Store,
    StoredSession,
    StoredTurn,
    StoreError,
)
from apiary_server.sessions.valkey.address import ValkeyAddress
from apiary_server.sessions.valkey.namespace import Namespace
from apiary_server.sessions.valkey.sessions import ValkeySessions
from apiary_server.sessions.valkey.snapshots import ValkeySnapshots

from .changes import SETTINGS, change, turn

Open = Callable[..., Store]


@pytest.fixture
def namespace(request: pytest.FixtureRequest) -> Callable[[str], Namespace]:
    """Own a namespace that only this test uses."""
    name = uuid.uuid4().hex

    def own(tokenizer: str = "bytes") -> Namespace:
        server = request.getfixturevalue("valkey_server")
        url = f"unix://{server.unix_socket_path}?namespace={name}&lease=3"
        return Namespace(ValkeyAddress.parse(url), tokenizer)

    return own


@pytest.fixture(params=["dir", "valkey"])
def sessions(request: pytest.FixtureRequest, tmp_path: Path, namespace: Callable[[str], Namespace]) -> Open:
    """Open the test's store of sessions."""
    if request.param == "dir":
        return lambda tokenizer="bytes": SqliteStore(tmp_path / "state", tokenizer)
    return lambda tokenizer="bytes": ValkeySessions(namespace(tokenizer))


@pytest.fixture(params=["dir", "valkey"])
def snapshots(
    request: pytest.FixtureRequest, tmp_path: Path, namespace: Callable[..., Namespace]
) -> Callable[[], SnapshotStore]:
    """Open the test's store of snapshots."""
    if request.param == "dir":
        return lambda: SnapshotFiles(tmp_path / "snapshots")
    return lambda: ValkeySnapshots(namespace())


@pytest.fixture
def store(sessions: Open) -> Iterator[Store]:
    with closing(sessions()) as store:
        yield store


@pytest.fixture
def kept(snapshots: Callable[[], SnapshotStore]) -> Iterator[SnapshotStore]:
    with closing(snapshots()) as store:
        yield store


def found(store: Store) -> dict[tuple[str, str], StoredSession]:
    return {(one.tenant, one.id): one for one in store.load()}


def test_what_was_written_is_found(sessions: Open) -> None:
    with closing(sessions()) as store:
        store.write([change("a", 0, turn(0), turn(5)), change("a", 0, turn(9), tenant="..")])
        store.write([change("a", 2, turn(10, 70_000)), change("empty")])
    with closing(sessions()) as other:
        there = found(other)
    assert there.keys() == {("default", "a"), ("..", "a"), ("default", "empty")}
    assert there["default", "a"] == StoredSession(
        "default", "a", SETTINGS, [turn(0), turn(5), turn(10, 70_000)]
    )
    assert there["default", "empty"].turns == []


def test_there_is_nothing_at_first(store: Store) -> None:
    assert found(store) == {}


def test_settings_change(store: Store) -> None:
    store.write([change("a", 0, turn(0))])
    later = dataclasses.replace(SETTINGS, ttl=3.5, expire_time=float("inf"), labels={})
    store.write([Change("default", "a", later, 1)])
    assert found(store)["default", "a"] == StoredSession("default", "a", later, [turn(0)])


def test_turns_are_taken_back_and_sessions_deleted(store: Store) -> None:
    store.write([change("a", 0, turn(0), turn(1), turn(2)), change("b", 0, turn(3))])
    store.write([change("a", 1, turn(7)), Change("default", "b", None), Change("default", "unknown", None)])
    store.write([Change("default", "c", None), change("c", 0, turn(8))])
    there = found(store)
    assert [stored.tokens[0] for stored in there["default", "a"].turns] == [0, 7]
    assert there.keys() == {("default", "a"), ("default", "c")}
    store.write([change("a")])
    assert found(store)["default", "a"].turns == []


def test_changes_of_one_session_are_made_in_order(store: Store) -> None:
    store.write([change("a", 0, turn(0), turn(1)), change("a", 2, turn(2)), change("a", 1, turn(3))])
    assert [each.tokens[0] for each in found(store)["default", "a"].turns] == [0, 3]
    store.write([change("a", 1, turn(4)), Change("default", "a", None), change("a", 0, turn(5))])
    assert [each.tokens[0] for each in found(store)["default", "a"].turns] == [5]


def test_a_write_that_is_repeated_changes_nothing(store: Store) -> None:
    """As after a failure of which nobody knows what it left."""
    for _ in range(2):
        store.write([change("a", 0, turn(0)), Change("default", "b", None)])
    for _ in range(2):
        store.write([change("a", 1, turn(1), turn(2))])
    assert [each.tokens[0] for each in found(store)["default", "a"].turns] == [0, 1, 2]


def test_all_or_nothing(store: Store) -> None:
    store.write([change("a", 0, turn(0))])
    broken = dataclasses.replace(turn(2).record, tail=b"no text")  # type: ignore[arg-type]
    with pytest.raises(StoreError):
        store.write([change("a"), change("b", 0, turn(1), StoredTurn(broken, turn(2).tokens))])
    store.write([change("b")])
    there = found(store)
    assert [len(there["default", id].turns) for id in "ab"] == [1, 0]


def test_many_sessions(store: Store) -> None:
    store.write([change(f"s{number}", 0, turn(number)) for number in range(1234)])
    there = found(store)
    assert {id: stored.turns[0].tokens[0] for (_, id), stored in there.items()} == {
        f"s{number}": number for number in range(1234)
    }


def test_one_worker_at_a_time(sessions: Open) -> None:
    with closing(sessions()) as store:
        store.write([change("a")])
        with pytest.raises(StoreError, match="in use by another worker"):
            sessions()
        store.write([change("b")])
    with closing(sessions()) as other:
        assert len(found(other)) == 2


def test_another_tokenizer_is_refused(sessions: Open) -> None:
    sessions().close()
    with pytest.raises(StoreError, match="another tokenizer"):
        sessions("words")
    sessions().close()


def test_a_snapshot_is_read(kept: SnapshotStore) -> None:
    assert kept.names() == {}
    kept.write("a-1.snapshot", [b"one", b"", b"two"])
    kept.write("b-1.snapshot", [bytes(1_000_000)])
    kept.write("empty", [])
    assert kept.names() == {"a-1.snapshot": 6, "b-1.snapshot": 1_000_000, "empty": 0}
    assert kept.read("a-1.snapshot", 100) == b"onetwo"
    assert kept.read("a-1.snapshot", 4) == b"onet"
    assert kept.read("b-1.snapshot", 2**40) == bytes(1_000_000)
    assert kept.read("empty", 10) == b""


def test_a_snapshot_is_replaced(kept: SnapshotStore) -> None:
    kept.write("a", [b"one", b"two"])
    kept.write("a", [b"3"])
    assert (kept.read("a", 10), kept.names()) == (b"3", {"a": 1})


def test_a_snapshot_that_is_not_there_is_none(kept: SnapshotStore) -> None:
    assert kept.read("a", 10) is None
    kept.delete("a")
    kept.write("a", [b"one"])
    kept.delete("a")
    assert kept.read("a", 10) is None
    assert kept.names() == {}


def test_snapshots_outlive_the_process(snapshots: Callable[[], SnapshotStore]) -> None:
    with closing(snapshots()) as store:
        store.write("a", [b"one"])
    with closing(snapshots()) as other:
        assert (other.read("a", 10), other.names()) == (b"one", {"a": 3})


def test_threads_do_not_mix_snapshots_up(kept: SnapshotStore) -> None:
    data = {f"s{number}": bytes([number]) * 100_000 for number in range(8)}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda item: kept.write(item[0], [item[1]]), data.items()))
        assert list(pool.map(lambda name: kept.read(name, 2**20), data)) == list(data.values())
