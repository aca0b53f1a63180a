"""Sessions that are stored: the end of an answer waits for that, and another engine goes on from there."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from apiary_server import errors
from apiary_server.engine.engine import Engine
from apiary_server.sessions.info import RebuildReason, State
from apiary_server.sessions.sqlite import SqliteStore
from apiary_server.sessions.store import Change, StoreError
from tests.server.driver import Reader, ask, begin, create, request, run, session, step

MakeEngine = Callable[..., Engine]
PROMPT = list(range(3, 153))


@pytest.fixture
def make(make_engine: MakeEngine, tmp_path: Path) -> Callable[[], Engine]:
    """Make an engine on the same directory, after the one before was closed. None lives until it would store
    caches."""
    return lambda: make_engine(
        start=False,
        state_dir=tmp_path / "state",
        store_patience=0.3,
        durability="idle",  # no snapshots of caches: the transcripts alone
        snapshot_delay=1e6,
    )


def close(engine: Engine) -> None:
    assert engine._journal is not None
    engine._journal.close(10)


@pytest.mark.parametrize("policy", ["buzz(sink=2,window=8,threshold=20)", "full(bound=900)"])
def test_another_engine_goes_on(make: Callable[[], Engine], make_engine: MakeEngine, policy: str) -> None:
    calm, engine = make_engine(start=False), make()
    for each in (calm, engine):
        create(each, "a", policy, labels={"of": "bees"})
        for number in range(3):
            answer = ask(each, PROMPT[: 20 + 40 * number], "a", max_tokens=5 + 13 * number, stop=("zzz",))
            assert answer.usage.durable is (each is engine)
    close(engine)
    other = make()
    info = other.sessions.get("default", "a")
    assert (info.state, info.turn_count, dict(info.labels)) == (State.STORED, 3, {"of": "bees"})
    assert info.policy == calm.sessions.get("default", "a").policy
    assert session(other, "a").transcript == session(calm, "a").transcript
    one, two = (ask(each, "go on", "a", max_tokens=40) for each in (other, calm))
    assert one.token_ids == two.token_ids
    assert one.usage.rebuild_reason is RebuildReason.RESTARTED
    assert ask(other, "and on", "a").usage.rebuild_reason is None
    close(other)


def test_a_policy_that_cannot_be_served_any_more_is_the_default(
    make: Callable[[], Engine], make_engine: MakeEngine, tmp_path: Path
) -> None:
    engine = make()
    create(engine, "a", "full(bound=900)")
    ask(engine, PROMPT, "a")
    close(engine)
    other = make_engine(start=False, state_dir=tmp_path / "state", cache_budget=86_144 + 3 * 14_080)
    assert other.sessions.get("default", "a").policy == other.model.default_policy
    assert ask(other, "go on", "a").usage.rebuild_reason is RebuildReason.POLICY_CHANGED
    close(other)


def test_a_store_that_fails_stops_nobody(make: Callable[[], Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make()
    create(engine, "a")
    assert ask(engine, PROMPT, "a").usage.durable
    assert engine._journal is not None
    store = engine._journal._store

    def refuse(changes: Sequence[Change]) -> None:
        raise StoreError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store, "write", refuse)
        assert not ask(engine, "more", "a").usage.durable
        assert not ask(engine, "and more", "a").usage.durable
        assert engine.capacity().store_degraded
    until = threading.Event()
    for _ in range(100):
        if not engine._journal.degraded:
            break
        until.wait(0.05)
    assert not engine.capacity().store_degraded
    assert ask(engine, "again", "a").usage.durable
    close(engine)
    other = make()
    assert other.sessions.get("default", "a").turn_count == 4
    close(other)


def test_a_store_that_fails_at_the_start_is_told_at_once(
    make: Callable[[], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    create(engine, "a")
    assert ask(engine, PROMPT, "a").usage.durable
    close(engine)

    def refuse(store: SqliteStore, changes: Sequence[Change]) -> None:
        raise StoreError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(SqliteStore, "write", refuse)
        other = make()
        assert other.capacity().store_degraded
        answer = ask(other, "go on", "a")
        assert not answer.usage.durable
    close(other)
    third = make()
    assert not third.capacity().store_degraded
    assert session(third, "a").transcript[-16:].tolist() == answer.token_ids
    close(third)


def test_a_session_that_cannot_be_read_costs_no_other(make: Callable[[], Engine], tmp_path: Path) -> None:
    engine = make()
    for id in "abc":
        create(engine, id)
        ask(engine, PROMPT, id)
    close(engine)
    with sqlite3.connect(tmp_path / "state" / "sessions.db") as connection:
        connection.execute("UPDATE turns SET tokens = x'00' WHERE id = 'b'")
    connection.close()
    other = make()
    assert other.capacity().unread_sessions == 1
    with pytest.raises(errors.SessionNotFound):
        other.sessions.get("default", "b")
    create(other, "b")
    for id in "abc":
        assert ask(other, "go on", id).usage.durable
    close(other)
    third = make()
    assert third.capacity().unread_sessions == 0
    assert [third.sessions.get("default", id).turn_count for id in "abc"] == [2, 1, 2]
    close(third)


def test_a_store_that_hangs_holds_up_an_answer_s_end_alone(
    make: Callable[[], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    create(engine, "a")
    assert ask(engine, PROMPT, "a").usage.durable
    assert engine._journal is not None
    write, go_on = engine._journal._store.write, threading.Event()

    def hang(changes: Sequence[Change]) -> None:
        go_on.wait(10)
        write(changes)

    monkeypatch.setattr(engine._journal._store, "write", hang)
    reader = begin(engine, request("more", "a", max_tokens=5))
    while len(reader.token_ids) < 5:
        step(engine)
    assert not reader.ended
    run(engine, reader)
    assert not reader.usage.durable
    go_on.set()
    close(engine)
    other = make()
    assert other.sessions.get("default", "a").turn_count == 2
    close(other)


def test_whoever_creates_a_session_is_told_when_it_is_stored(
    make: Callable[[], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    assert engine._journal is not None
    write, go_on = engine._journal._store.write, threading.Event()

    def hang(changes: Sequence[Change]) -> None:
        go_on.wait(10)
        write(changes)

    monkeypatch.setattr(engine._journal._store, "write", hang)
    created = engine.keeper.create("default", "a", None, None, None, {})
    assert not created.done()
    go_on.set()
    assert created.result(10).id == "a"
    go_on.clear()
    hanging = engine.keeper.create("default", "b", None, None, None, {})
    for _ in range(100):
        if hanging.done():
            break
        step(engine)
    assert hanging.result(0).id == "b", "a store that hangs is not waited for"
    assert engine.capacity().store_degraded
    go_on.set()
    close(engine)
    other = make()
    assert len(other.sessions) == 2
    close(other)


def test_a_repeated_answer_is_stored_before_it_ends(
    make: Callable[[], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    create(engine, "a")
    first = ask(engine, PROMPT, "a", request_id="x")
    again = Reader()
    engine.open(request(PROMPT, "a", request_id="x"), again)
    assert again.token_ids == first.token_ids
    assert again.usage.durable
    close(engine)


def test_one_shot_requests_are_not_stored(make: Callable[[], Engine]) -> None:
    engine = make()
    assert not ask(engine, PROMPT).usage.durable
    close(engine)
    other = make()
    assert len(other.sessions) == 0
    close(other)


def test_expired_sessions_are_gone_for_good(make: Callable[[], Engine]) -> None:
    engine = make()
    create(engine, "a")
    ask(engine, PROMPT, "a")
    session(engine, "a").expire_time = 1.0
    engine.sessions.changed(session(engine, "a"))
    close(engine)
    other = make()
    assert [(one.id, one.expire_time) for one in other.sessions._sessions.values()] == [("a", 1.0)]
    step(other)
    assert len(other.sessions) == 0
    close(other)
    third = make()
    assert len(third.sessions) == 0
    close(third)
