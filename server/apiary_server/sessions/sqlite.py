"""A store in a directory: a SQLite database, which knows about fsync, half-written pages and full disks."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sqlite3
import sys
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

from apiary_server.sessions.session import TurnRecord
from apiary_server.sessions.store import Change, StoredSession, StoredSettings, StoredTurn, StoreError

_APPLICATION = 0x41504941  # "APIA"
_VERSION = 1
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


class SqliteStore:
    """Sessions in `sessions.db` of a directory, which one process uses at a time.

    Tokens are 32-bit integers, little-endian; records and labels are JSON.

    Args:
        directory: it is made if it is missing, for this user alone.
        tokenizer: a digest of the tokenizer; transcripts mean nothing to another.

    Raises:
        StoreError: the directory cannot be made; another process uses it; or what is there is of a newer
            version, of another tokenizer, or no database.
    """

    def __init__(self, directory: Path, tokenizer: str) -> None:
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"the state directory {directory} cannot be made ({error.strerror}): name one in which this "
                "user can write with --state-dir"
            ) from error
        self._path = directory / "sessions.db"
        with self._explained():
            # commits are this class's own, so that many changes are one; and no other process comes between
            self._connection = sqlite3.connect(
                self._path, timeout=1.0, isolation_level=None, check_same_thread=False
            )
            try:
                self._prepare(tokenizer)
            except BaseException:
                self._connection.close()
                raise

    def load(self) -> Iterator[StoredSession]:
        """As `Store.load`."""
        with self._explained():
            rows = self._connection.execute(
                "SELECT tenant, id, policy, ttl, expire_time, labels, create_time, update_time FROM sessions"
            )
            for tenant, id, policy, ttl, expire_time, labels, *times in rows:
                turns = self._connection.execute(
                    "SELECT record, tokens FROM turns WHERE tenant = ? AND id = ? ORDER BY number",
                    (tenant, id),
                )
                yield StoredSession(
                    tenant,
                    id,
                    StoredSettings(policy, ttl, expire_time, json.loads(labels), *times),
                    [StoredTurn(TurnRecord(**json.loads(record)), _tokens(blob)) for record, blob in turns],
                )

    def write(self, changes: Sequence[Change]) -> None:
        """As `Store.write`."""
        with self._explained(), self._transaction():
            for change in changes:
                self._write(change)

    def close(self) -> None:
        """As `Store.close`."""
        self._connection.close()

    def _prepare(self, tokenizer: str) -> None:
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
            for statement in filter(str.strip, _SCHEMA.split(";")):
                run(statement)
            run("INSERT INTO about VALUES (?)", (tokenizer,))
            run(f"PRAGMA application_id = {_APPLICATION}")
            run(f"PRAGMA user_version = {_VERSION}")
        elif application != _APPLICATION:
            raise StoreError(f"{self._path} is a database of another program: choose another state directory")
        elif version > _VERSION:
            raise StoreError(
                f"{self._path} has format {version}, and this worker knows {_VERSION}: use a newer apiary, "
                "or another state directory"
            )
        run("COMMIT")
        (known,) = run("SELECT tokenizer FROM about").fetchone()
        if known != tokenizer:
            raise StoreError(
                f"the sessions in {self._path} are of a model with another tokenizer: serve that model, "
                "or choose another state directory"
            )

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
            record = json.dumps(dataclasses.asdict(turn.record))
            run("INSERT INTO turns VALUES (?, ?, ?, ?, ?)", (*key, number, record, _blob(turn.tokens)))

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
                raise StoreError(f"{self._path} is in use by another worker") from error
            raise StoreError(f"{self._path}: {error}") from error
        except (sqlite3.Error, ValueError, TypeError) as error:
            raise StoreError(
                f"{self._path}: {error}; put a copy of it there that is whole, or move it away, and its "
                "sessions with it, or choose another --state-dir"
            ) from error


def _blob(tokens: array[int]) -> bytes:
    if sys.byteorder == "big":
        tokens = tokens[:]
        tokens.byteswap()
    return tokens.tobytes()


def _tokens(blob: bytes) -> array[int]:
    tokens = array("I", blob)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens
