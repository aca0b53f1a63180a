"""Engines with a state directory, one after the other."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from apiary_server.engine.engine import Engine
from apiary_server.sessions.archive import Archive
from apiary_server.sessions.store import StoreError
from tests.server.driver import session, until

SLOT = 14_080  # bytes of a default session
WORKSPACE = 86_144


def archive(engine: Engine) -> Archive:
    assert engine._archive is not None
    return engine._archive


def close(engine: Engine, *, snapshots: bool = True) -> None:
    """End as a worker does; or as if it was killed before it made its last snapshots."""
    assert engine._journal is not None
    engine._journal.close(10)
    if not snapshots:
        archive(engine)._dirty.clear()
    archive(engine).close(10)


def saved(engine: Engine, *ids: str) -> None:
    """Step until the sessions have snapshots as they are, and those before are deleted."""
    shelf = archive(engine).shelf

    def done() -> bool:
        current = all(shelf.current(session(engine, id)) for id in ids)
        resting = not archive(engine)._dirty and not shelf.untidy and archive(engine)._writing_since is None
        return current and resting

    until(engine, done)


def snapshots(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "state" / "snapshots").iterdir())


def refuse_writes(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the store take no snapshot any more."""

    def refuse(*_: object) -> None:
        raise StoreError("no space left on device")

    monkeypatch.setattr(archive(engine).shelf._store, "write", refuse)


def hang_reads(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Have the store hang when it is read, until the first event; the second tells that it does."""
    go_on, hangs, read = threading.Event(), threading.Event(), archive(engine).shelf._store.read

    def hang(name: str, most: int) -> bytes | None:
        hangs.set()
        go_on.wait(20)
        return read(name, most)

    monkeypatch.setattr(archive(engine).shelf._store, "read", hang)
    return go_on, hangs
