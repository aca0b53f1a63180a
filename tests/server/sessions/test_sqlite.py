"""The store in a directory: what was written is there, whoever reads it, and what is no store is refused."""

from __future__ import annotations

import dataclasses
import sqlite3
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

from apiary_server.sessions.session import TurnRecord
from apiary_server.sessions.sqlite import SqliteStore
from apiary_server.sessions.store import Change, StoredSession, StoredSettings, StoredTurn, StoreError

SETTINGS = StoredSettings("buzz2", None, 2e9, {"team": "bees \u2620"}, 1e9, 1.5e9)


def turn(number: int, tokens: int = 5) -> StoredTurn:
    record = TurnRecord(tokens - 2, 2, chat=True, seen=tokens, finish="stop", seed=2**64 - 1, request_id="x")
    return StoredTurn(record, array("I", range(number, number + tokens)))


def change(id: str, kept: int = 0, *turns: StoredTurn, tenant: str = "default") -> Change:
    return Change(tenant, id, SETTINGS, kept, turns)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "state" / "here"


@pytest.fixture
def store(directory: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(directory, "bytes")
    yield store
    store.close()


def again(store: SqliteStore, directory: Path) -> dict[tuple[str, str], StoredSession]:
    """What another process finds."""
    store.close()
    other = SqliteStore(directory, "bytes")
    try:
        return {(one.tenant, one.id): one for one in other.load()}
    finally:
        other.close()


def test_what_was_written_is_found(store: SqliteStore, directory: Path) -> None:
    store.write([change("a", 0, turn(0), turn(5)), change("a", 0, turn(9), tenant=".."), change("empty")])
    store.write([change("a", 2, turn(10, 70_000))])
    found = again(store, directory)
    assert found.keys() == {("default", "a"), ("..", "a"), ("default", "empty")}
    assert found["default", "a"] == StoredSession(
        "default", "a", SETTINGS, [turn(0), turn(5), turn(10, 70_000)]
    )
    assert found["default", "empty"].turns == []
    assert directory.stat().st_mode & 0o077 == 0


def test_turns_are_taken_back_and_sessions_deleted(store: SqliteStore, directory: Path) -> None:
    store.write([change("a", 0, turn(0), turn(1), turn(2)), change("b", 0, turn(3))])
    store.write([change("a", 1, turn(7)), Change("default", "b", None), Change("default", "unknown", None)])
    store.write([Change("default", "c", None), change("c", 0, turn(8))])
    found = again(store, directory)
    assert [stored.tokens[0] for stored in found["default", "a"].turns] == [0, 7]
    assert found.keys() == {("default", "a"), ("default", "c")}


def test_all_or_nothing(store: SqliteStore, directory: Path) -> None:
    store.write([change("a", 0, turn(0))])
    broken = dataclasses.replace(turn(2).record, tail=b"no text")  # type: ignore[arg-type]
    with pytest.raises(StoreError):
        store.write([change("a", 0), change("b", 0, turn(1), StoredTurn(broken, turn(2).tokens))])
    store.write([change("b")])
    assert len(again(store, directory)["default", "a"].turns) == 1


def test_one_worker_at_a_time(store: SqliteStore, directory: Path) -> None:
    store.write([change("a")])
    with pytest.raises(StoreError, match="in use by another worker"):
        SqliteStore(directory, "bytes")
    store.close()
    SqliteStore(directory, "bytes").close()


def test_another_tokenizer_is_refused(store: SqliteStore, directory: Path) -> None:
    store.close()
    with pytest.raises(StoreError, match="another tokenizer"):
        SqliteStore(directory, "words")


def test_another_version_or_program_is_refused(store: SqliteStore, directory: Path) -> None:
    store.close()
    for pragma, said in (("user_version = 99", "newer apiary"), ("application_id = 7", "another program")):
        with sqlite3.connect(directory / "sessions.db") as connection:
            connection.execute(f"PRAGMA {pragma}")
        connection.close()
        with pytest.raises(StoreError, match=said):
            SqliteStore(directory, "bytes")


def test_what_is_no_database_is_refused(directory: Path) -> None:
    content = b"no database at all, but long enough to look like one" * 99
    directory.mkdir(parents=True)
    (directory / "sessions.db").write_bytes(content)
    with pytest.raises(StoreError):
        SqliteStore(directory, "bytes")
    assert (directory / "sessions.db").read_bytes() == content


def test_a_damaged_database_is_an_error_and_not_a_crash(store: SqliteStore, directory: Path) -> None:
    store.write([change(f"s{number}", 0, turn(number, 900)) for number in range(50)])
    store.close()
    path = directory / "sessions.db"
    whole = path.read_bytes()
    refused = 0
    for at in range(100, len(whole), 4001):
        path.write_bytes(whole[:at] + b"\xff\x00\xaa" * 30 + whole[at + 90 :])
        try:
            damaged = SqliteStore(directory, "bytes")
        except StoreError:
            refused += 1
            continue
        try:
            list(damaged.load())
        except StoreError:
            refused += 1
        finally:
            damaged.close()
    assert refused > 0


def test_a_full_disk_is_told(store: SqliteStore, directory: Path) -> None:
    store.write([change("a", 0, turn(0))])
    store._connection.execute("PRAGMA max_page_count = 8")
    with pytest.raises(StoreError, match="full"):
        store.write([change("a", 1, turn(1, 200_000))])
    store._connection.execute("PRAGMA max_page_count = 100000")
    store.write([change("a", 1, turn(1, 200_000))])
    assert len(again(store, directory)["default", "a"].turns) == 2
