"""What is special about a store in a directory: whose it is, what damage and full disks do."""

from __future__ import annotations

import resource
import sqlite3
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from apiary_server.sessions.sqlite import SqliteStore
from apiary_server.sessions.store import StoredSession, StoreError

from .changes import SETTINGS, change, turn


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


def test_it_is_for_this_user_alone(store: SqliteStore, directory: Path) -> None:
    assert directory.stat().st_mode & 0o077 == 0


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


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE turns SET record = substr(record, 2) WHERE id = 's2' AND number = 1",
        "UPDATE turns SET record = '{}' WHERE id = 's2'",
        "UPDATE turns SET record = '[]' WHERE id = 's2'",
        "UPDATE turns SET record = '7' WHERE id = 's2'",
        "UPDATE turns SET record = replace(record, '\"stop\"', '\"step\"') WHERE id = 's2' AND number = 1",
        "UPDATE turns SET tokens = (SELECT tokens FROM turns WHERE id = 's1') WHERE id = 's2' AND number = 0",
        "UPDATE turns SET record = x'ff' WHERE id = 's2'",
        "UPDATE turns SET tokens = substr(tokens, 2) WHERE id = 's2' AND number = 0",
        "UPDATE turns SET tokens = substr(tokens, 5) WHERE id = 's2' AND number = 0",
        "DELETE FROM turns WHERE id = 's2' AND number = 0",
        "UPDATE sessions SET labels = '{' WHERE id = 's2'",
        "UPDATE sessions SET labels = '7' WHERE id = 's2'",
        "UPDATE sessions SET policy = x'00' WHERE id = 's2'",
        "UPDATE sessions SET expire_time = 'soon' WHERE id = 's2'",
    ],
)
def test_one_damaged_session_is_left_out_and_kept(store: SqliteStore, directory: Path, damage: str) -> None:
    store.write([change(f"s{number}", 0, turn(number), turn(9)) for number in range(5)])
    whole = again(store, directory)
    with sqlite3.connect(directory / "sessions.db") as connection:
        connection.execute(damage)
    connection.close()
    damaged = SqliteStore(directory, "bytes")
    try:
        with capture_logs() as logs:
            found = {(one.tenant, one.id): one for one in damaged.load()}
        assert damaged.unread == 1
        assert found == {key: session for key, session in whole.items() if key != ("default", "s2")}
        assert [log["which"][:31] for log in logs if "which" in log] == [
            "session 's2' of tenant 'default'"[:31]
        ]
        (kept,) = directory.glob("sessions-damaged-*.db")
        assert {path.name for path in directory.iterdir()} - {kept.name} <= {"sessions.db", "sessions.db-wal"}
        with sqlite3.connect(kept) as connection:
            assert connection.execute("SELECT id FROM sessions WHERE id = 's2'").fetchall() == [("s2",)]
        connection.close()
        damaged.write([change("s2", 0, turn(7))])
    finally:
        damaged.close()
    found["default", "s2"] = StoredSession("default", "s2", SETTINGS, [turn(7)])
    healthy = SqliteStore(directory, "bytes")
    assert {(one.tenant, one.id): one for one in healthy.load()} == found
    assert healthy.unread == 0
    healthy.close()


def test_bits_that_change_are_noticed(store: SqliteStore, directory: Path) -> None:
    store.write([change("a", 0, turn(1000, 5000)), change("b", 0, turn(0))])
    original = again(store, directory)
    path, whole = directory / "sessions.db", bytearray((directory / "sessions.db").read_bytes())
    start = whole.index(array("I", range(5000, 5100)).tobytes())  # within a page that a turn overflows to
    whole[start + 33] ^= 16
    path.write_bytes(whole)
    damaged = SqliteStore(directory, "bytes")
    assert list(damaged.load()) == [original["default", "b"]]
    assert damaged.unread == 1
    damaged.close()


def test_version_1_is_read(store: SqliteStore, directory: Path) -> None:
    store.write([change("a", 0, turn(0), turn(1))])
    original = again(store, directory)
    with sqlite3.connect(directory / "sessions.db") as connection:
        connection.execute("UPDATE turns SET record = json_remove(record, '$.crc32')")
        connection.execute("PRAGMA user_version = 1")
    connection.close()
    old = SqliteStore(directory, "bytes")
    assert list(old.load()) == [original["default", "a"]]
    old.write([change("a", 2, turn(2))])
    assert len(again(old, directory)["default", "a"].turns) == 3


def test_where_nothing_can_be_read_nothing_is_taken_away(store: SqliteStore, directory: Path) -> None:
    store.write([change("a", 0, turn(1))])
    store.close()
    with sqlite3.connect(directory / "sessions.db") as connection:
        connection.execute("UPDATE sessions SET labels = '{'")
    connection.close()
    content = (directory / "sessions.db").read_bytes()
    damaged = SqliteStore(directory, "bytes")
    with pytest.raises(StoreError, match="none of its sessions can be read"):
        list(damaged.load())
    damaged.close()
    assert (directory / "sessions.db").read_bytes() == content
    assert [path.name for path in directory.iterdir()] == ["sessions.db"]


@pytest.mark.parametrize("junk", [b"\xff" * 4096, bytes(4096)], ids=["ones", "zeros"])
def test_one_bad_page(store: SqliteStore, directory: Path, junk: bytes) -> None:
    """Of any kind: header, schema, roots, inner pages, leaves, and those that long turns overflow to."""
    store.write([change(f"s{number:03}", 0, turn(number, 80), turn(5)) for number in range(150)])
    store.write([change("long", 0, turn(1, 3000))])
    original = again(store, directory)
    path, whole = directory / "sessions.db", (directory / "sessions.db").read_bytes()
    refused, some = 0, 0
    for start in range(0, len(whole), 4096):
        path.write_bytes(whole[:start] + junk + whole[start + 4096 :])
        content = path.read_bytes()
        try:
            damaged = SqliteStore(directory, "bytes")
        except StoreError:
            refused += 1
            continue
        try:
            found = {(one.tenant, one.id): one for one in damaged.load()}
        except StoreError:
            refused += 1
            continue
        finally:
            damaged.close()
        assert found.items() <= original.items(), "nothing is read that was not written"
        assert (found == original) == (damaged.unread == 0)
        if damaged.unread:
            some += 1
            assert len(found) >= 50, "an inner page may lead to half of them"
            (kept,) = directory.glob("sessions-damaged-*.db")
            assert kept.read_bytes() == content
            kept.unlink()
        healthy = SqliteStore(directory, "bytes")
        assert {(one.tenant, one.id): one for one in healthy.load()} == found
        assert healthy.unread == 0
        healthy.close()
    assert refused <= 5, "the header, the schema, the tokenizer, two roots"
    assert some > 20


def test_a_full_disk_is_told(store: SqliteStore, directory: Path) -> None:
    store.write([change("a", 0, turn(0))])
    store._connection.execute("PRAGMA max_page_count = 8")
    with pytest.raises(StoreError, match="full"):
        store.write([change("a", 1, turn(1, 200_000))])
    store._connection.execute("PRAGMA max_page_count = 100000")
    store.write([change("a", 1, turn(1, 200_000))])
    assert len(again(store, directory)["default", "a"].turns) == 2


def test_a_disk_that_was_full_before_is_told(store: SqliteStore, directory: Path) -> None:
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    store.write([])
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, most))  # no file may grow beyond that
    try:
        with pytest.raises(StoreError):
            store.write([])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    store.write([])
    assert again(store, directory) == {}


def test_a_directory_that_is_gone_for_a_while_is_told(store: SqliteStore, directory: Path) -> None:
    away = directory.with_name("away")
    directory.rename(away)
    with pytest.raises(StoreError, match="No such file"):
        store.write([change("a", 0, turn(0))])
    directory.mkdir()
    (directory / "sessions.db").touch()
    with pytest.raises(StoreError, match="another file"):
        store.write([])
    (directory / "sessions.db").unlink()
    directory.rmdir()
    away.rename(directory)
    store.write([change("b", 0, turn(0))])
    assert again(store, directory).keys() == {("default", "b")}
