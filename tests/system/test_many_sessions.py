"""A worker that starts on a state directory of many sessions."""

from __future__ import annotations

import dataclasses
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import psutil
import pytest

from apiary_client import State, Stopping
from apiary_server.sessions.session import Session
from apiary_server.sessions.shelf import _key, _name
from apiary_server.sessions.sqlite import SqliteStore
from apiary_server.sessions.store import Change

from .reading import tokens
from .worker import SMALL, Worker

Start = Callable[[Path], Worker]
COUNT = 10_000
MOST_SECONDS = 5.0  # from the start to the ready line, more than with no session
MOST_BYTES = 4096  # of memory, for each session
TRIES = 3  # of two starts beside each other: others may have kept the machine busy in one of them


@pytest.fixture(scope="module")
def start(start_worker: Callable[..., Worker], tiny_model: Path) -> Start:
    """Start a worker with a small pool on a state directory."""
    return lambda directory: start_worker(
        "--model", str(tiny_model), *SMALL, "--cache-budget", "2MiB", "--state-dir", str(directory)
    )


@pytest.fixture(scope="module")
def crowded(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state directory with so many sessions, each with a snapshot: all are copies of one that a worker
    stored."""
    one, many = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("many")
    worker = start(one)
    with worker.client() as client:
        client.create_session("one")
        for text in ("Tell me of bees.", "And of wasps."):
            client.generate(text, session="one", stopping=tokens(12))
    assert worker.stop() == 0
    with closing(sqlite3.connect(one / "sessions.db")) as database:
        (tokenizer,) = database.execute("SELECT tokenizer FROM about").fetchone()
    store = SqliteStore(one, tokenizer)
    (template,) = store.load()
    store.close()
    (snapshot,) = (one / "snapshots").iterdir()
    (many / "snapshots").mkdir()
    changes = []
    for number in range(COUNT):
        settings = dataclasses.replace(
            template.settings,
            create_time=template.settings.create_time + number,
            labels={"owner": f"user-{number}"},
        )
        change = Change(template.tenant, f"s{number:05}", settings, 0, template.turns)
        named = SimpleNamespace(tenant=change.tenant, id=change.id, create_time=settings.create_time)
        name = _name(_key(cast(Session, named)), len(template.turns))
        shutil.copyfile(snapshot, many / "snapshots" / name)
        changes.append(change)
    store = SqliteStore(many, tokenizer)
    store.write(changes)
    store.close()
    return many


def resident(worker: Worker) -> int:
    """Its memory in bytes."""
    return int(psutil.Process(worker.process.pid).memory_info().rss)


@pytest.mark.timeout(600)
def test_many_stored_sessions_cost_little(start: Start, crowded: Path, tmp_path: Path) -> None:
    for number in range(TRIES):
        empty = start(tmp_path / f"empty-{number}")
        empty_bytes = resident(empty)
        assert empty.stop() == 0
        worker = start(crowded)
        if worker.ready_seconds - empty.ready_seconds <= MOST_SECONDS or number == TRIES - 1:
            break
        assert worker.stop() == 0
    assert worker.ready_seconds - empty.ready_seconds <= MOST_SECONDS
    assert resident(worker) - empty_bytes <= MOST_BYTES * COUNT
    with worker.client() as client:
        sessions = list(client.list_sessions())
        assert [session.id for session in sessions] == [f"s{number:05}" for number in range(COUNT)]
        assert {session.turn_count for session in sessions} == {2}
        assert {session.state for session in sessions} <= {State.STORED, State.RESIDENT, State.BUSY}
        assert resident(worker) - empty_bytes <= MOST_BYTES * COUNT
        assert client.get_capacity().stored_sessions == COUNT
        for name in ("s00000", f"s{COUNT // 2:05}", f"s{COUNT - 1:05}"):
            usage = client.generate("And of ants.", session=name, stopping=Stopping(max_tokens=4)).usage
            assert usage.rebuild_reason is None
            assert usage.cached_tokens > 50
    assert worker.stop() == 0
    assert len(list((crowded / "snapshots").iterdir())) == COUNT
