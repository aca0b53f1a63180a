"""A store in a directory: a SQLite database, which knows about fsync, half-written pages and full disks."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import sqlite3
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any

import structlog

from apiary_server.sessions.files import sync
from apiary_server.sessions.session import TurnRecord
from apiary_server.sessions.store import Change, StoredSession, StoredSettings, StoredTurn, StoreError
from apiary_server.sessions.stored import pack, unpack

_log = structlog.get_logger(__name__)
_APPLICATION = 0x41504941  # "APIA"
_VERSION = 2
_SCHEMA = """
CREATE TABLE about (tokenizer TEXT NOT NULL);
CREATE TABLE sessions (
    tenant TEXT, id TEXT, policy TEXT NOT NULL, ttl REAL, expire_time REAL NOT NULL, labels TEXT NOT NULL,
    create_time REAL NOT NULL, update_time REAL NOT NULL, PRIMARY KEY (tenant, id)
) WITHOUT ROWID;
CREATE TABLE turns (
    tenant TEXT, id TEXT, number INTEGER, record TEXT NOT NULL, tokens BLOB NOT NULL,
    PRIMARY KEY (tenant, id, number)
) WITHOUT ROWID;
"""
_COLUMNS: Sequence[type | UnionType] = (str, str, str, float | None, float, str, float, float)  # of sessions
_DAMAGE = (sqlite3.DatabaseError, ValueError, TypeError)  # what comes of reading what is damaged


class SqliteStore:
    """Sessions in `sessions.db` of a directory, which one process uses at a time.

    Tokens are 32-bit integers, little-endian; records and labels are JSON. A record has the CRC-32 of what
    else it has and of its tokens, since SQLite does not notice bits that change there; version 1 had none.
    Where something cannot be read, the rest goes into a new database, since one that is damaged must not be
    written to: that is kept beside it, as `sessions-damaged-{time}.db`.

    Args:
        directory: it is made if it is missing, for this user alone.
        tokenizer: a digest of the tokenizer; transcripts mean nothing to another.
        snapshots: where those of its sessions are. While there are some, no database is begun: whoever lost
            one may have it still elsewhere.

    Attributes:
        unread: as of `Store`.

    Raises:
        StoreError: the directory cannot be made; another process uses it; or what is there is of a newer
            version, of another tokenizer, or no database; or that is missing.
    """

    def __init__(self, directory: Path, tokenizer: str, snapshots: Path | None = None) -> None:
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"the state directory {directory} cannot be made ({error.strerror}): name one in which this "
                "user can write with --state-dir"
            ) from error
        self.unread = 0
        self._path = directory / "sessions.db"
        self._tokenizer = tokenizer
        self._snapshots = snapshots
        self._open()

    def load(self) -> Iterator[StoredSession]:
        """As `Store.load`."""
        with self._explained():
            read = 0
            for found in self._read():
                if isinstance(found, StoredSession):
                    read += 1
                    yield found
                else:
                    self.unread += 1
                    _log.error("stored sessions cannot be read", which=found)
            if self.unread and not read:
                raise sqlite3.DatabaseError("none of its sessions can be read")
            if self.unread:
                self._renew()

    def write(self, changes: Sequence[Change]) -> None:
        """As `Store.write`."""
        self._check_place()
        with self._explained(), self._transaction():
            for change in changes:
                self._write(change)
            if not changes:  # a page is written for this, though it says what it said before
                self._connection.execute(f"PRAGMA user_version = {_VERSION}")

    def close(self) -> None:
        """As `Store.close`."""
        self._connection.close()

    def _open(self) -> None:
        with self._explained():
            # commits are this class's own, so that many changes are one; and no other process comes between
            self._connection = sqlite3.connect(
                self._path, timeout=1.0, isolation_level=None, check_same_thread=False
            )
            try:
                self._prepare()
                self._opened = self._path.stat()
            except BaseException:
                self._connection.close()
                raise

    def _check_place(self) -> None:
        """Check that the database is where others look for it: SQLite writes on to one that is not."""
        try:
            there = os.path.samestat(self._path.stat(), self._opened)
        except OSError as error:
            raise StoreError(f"{self._path}: {error.strerror}; put it back") from error
        if not there:
            raise StoreError(f"{self._path} is another file than the one that was opened: put that back")

    def _prepare(self) -> None:
        run = self._connection.execute
        run("PRAGMA locking_mode = EXCLUSIVE")
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = FULL")
        run("BEGIN EXCLUSIVE")
        (version,), (application,) = (
            run("PRAGMA user_version").fetchone(),
            run("PRAGMA application_id").fetchone(),
        )
        if version == application == 0 and not run("SELECT 1 FROM sqlite_schema").fetchone():
            if self._snapshots is not None and any(self._snapshots.glob("*.snapshot")):
                raise StoreError(
                    f"{self._path} is missing or empty, but {self._snapshots} has snapshots of its sessions: "
                    "put the database back, or remove the snapshots to begin anew"
                )
            for statement in filter(str.strip, _SCHEMA.split(";")):
                run(statement)
            run("INSERT INTO about VALUES (?)", (self._tokenizer,))
            run(f"PRAGMA application_id = {_APPLICATION}")
            run(f"PRAGMA user_version = {_VERSION}")
        elif application != _APPLICATION:
            raise StoreError(f"{self._path} is a database of another program: choose another state directory")
        elif version > _VERSION:
            raise StoreError(
                f"{self._path} has format {version}, and this worker knows {_VERSION}: use a newer apiary, "
                "or another state directory"
            )
        elif version < _VERSION:  # which can be read as it is
            run(f"PRAGMA user_version = {_VERSION}")
        run("COMMIT")
        (known,) = run("SELECT tokenizer FROM about").fetchone()
        if known != self._tokenizer:
            raise StoreError(
                f"the sessions in {self._path} are of a model with another tokenizer: serve that model, "
                "or choose another state directory"
            )

    def _read(self) -> Iterator[StoredSession | str]:
        """The sessions; where one or more cannot be read, which and why."""
        for row in self._rows():
            if isinstance(row, str):
                yield row
                continue
            try:
                session = self._session(*row)
            except _DAMAGE as error:
                yield f"session {row[1]!r} of tenant {row[0]!r}: {error}"
            else:
                yield session

    def _rows(self) -> Iterator[Sequence[Any] | str]:
        """Rows of sessions from the first on; after a bad page from the last one back to it."""
        walk = "SELECT * FROM sessions WHERE (tenant, id) > (?, ?) ORDER BY tenant {0}, id {0}"
        last = ("", "")
        try:
            for row in self._connection.execute(walk.format("ASC"), last):
                yield row
                last = row[:2]
        except sqlite3.DatabaseError as error:
            yield f"sessions after {last[1]!r} of tenant {last[0]!r}: {error}"
            with contextlib.suppress(sqlite3.DatabaseError):
                yield from self._connection.execute(walk.format("DESC"), last)

    def _session(self, *row: Any) -> StoredSession:
        if not all(isinstance(value, kind) for value, kind in zip(row, _COLUMNS, strict=True)):
            raise ValueError("its settings are not what they should be")
        tenant, id, policy, ttl, expire_time, labels, *times = row
        turns: list[StoredTurn] = []
        for number, record, tokens in self._connection.execute(
            "SELECT number, record, tokens FROM turns WHERE tenant = ? AND id = ? ORDER BY number",
            (tenant, id),
        ):
            fields = dict(json.loads(record))
            if fields.pop("crc32", None) not in (None, _crc32(fields, tokens)):
                raise ValueError(f"turn {number} has changed since it was stored")
            turn = StoredTurn(TurnRecord(**fields), unpack(tokens))
            if number != len(turns) or turn.record.tokens != len(turn.tokens):
                raise ValueError(f"turn {len(turns)} is not whole")
            turns.append(turn)
        settings = StoredSettings(policy, ttl, expire_time, dict(json.loads(labels)), *times)
        return StoredSession(tenant, id, settings, turns)

    def _renew(self) -> None:
        """Put what can be read into a new database, in place of this one, which gets another name."""
        directory = self._path.parent
        workshop, damaged = directory / "renewed", directory / f"sessions-damaged-{time.time_ns()}.db"
        shutil.rmtree(workshop, ignore_errors=True)  # what a start left that was cut short
        fresh = SqliteStore(workshop, self._tokenizer)
        with contextlib.closing(fresh), fresh._transaction():
            for found in self._read():
                if isinstance(found, StoredSession):
                    fresh._write(Change(found.tenant, found.id, found.settings, 0, found.turns))
        self.close()
        if self._path.with_name(f"{self._path.name}-wal").exists():  # it would be taken for the new one's
            raise StoreError(f"{self._path} could not be closed: make room on its disk")
        os.link(self._path, damaged)
        fresh._path.replace(self._path)
        workshop.rmdir()
        sync(directory)
        self._open()
        _log.warning("a new database has what could be read; the damaged one was kept", damaged=str(damaged))

    def _write(self, change: Change) -> None:
        run, key, settings = self._connection.execute, (change.tenant, change.id), change.settings
        run("DELETE FROM turns WHERE tenant = ? AND id = ? AND number >= ?", (*key, change.kept))
        if settings is None:
            run("DELETE FROM sessions WHERE tenant = ? AND id = ?", key)
            return
        labels = json.dumps(dict(settings.labels))
        times = (settings.create_time, settings.update_time)
        run(
            "REPLACE INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (*key, settings.policy, settings.ttl, settings.expire_time, labels, *times),
        )
        for number, turn in enumerate(change.turns, change.kept):
            fields, tokens = dataclasses.asdict(turn.record), pack(turn.tokens)
            record = json.dumps(fields | {"crc32": _crc32(fields, tokens)})
            run("INSERT INTO turns VALUES (?, ?, ?, ?, ?)", (*key, number, record, tokens))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # some failures have ended it
                self._connection.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise StoreError(
                    f"{self._path} is in use by another worker: stop that, or choose another --state-dir"
                ) from error
            if not os.access(self._path.parent, os.W_OK):
                raise StoreError(
                    f"{self._path.parent} cannot be written: make it writable, or choose another --state-dir"
                ) from error
            raise StoreError(f"{self._path}: {error}") from error
        except (sqlite3.Error, ValueError, TypeError) as error:
            raise StoreError(
                f"{self._path}: {error}; put a copy of it there that is whole, or move it away, and its "
                "sessions with it, or choose another --state-dir"
            ) from error


def _crc32(fields: dict[str, Any], tokens: bytes) -> int:
    return zlib.crc32(tokens, zlib.crc32(json.dumps(fields).encode()))
