"""The journal: what changed is stored, together, and again after a failure; nobody waits for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

import pytest

from apiary_server.sessions.journal import Journal
from apiary_server.sessions.manager import SessionManager
from apiary_server.sessions.request import SessionChange
from apiary_server.sessions.session import Session, TurnRecord
from apiary_server.sessions.store import Change, StoredSession, StoreError, StoreForgot
from buzz import parse


class Memory:
    """A store that keeps all in a dictionary, and fails or hangs when it is told to."""

    def __init__(self) -> None:
        self.sessions: dict[tuple[str, str], list[int]] = {}  # first tokens of the turns
        self.writes: list[Sequence[Change]] = []
        self.failing = False
        self.forgetful = False
        self.open = threading.Event()
        self.open.set()
        self.closed = False
        self.unread = 0
        self.tries = 0

    def load(self) -> Iterator[StoredSession]:
        return iter(())

    def write(self, changes: Sequence[Change]) -> None:
        self.tries += 1
        self.open.wait(10)
        if self.failing:
            raise StoreError("the disk is full")
        if self.forgetful:
            self.forgetful = False
            self.sessions.clear()
            raise StoreForgot("all is gone")
        self.writes.append(changes)
        for change in changes:
            key = change.tenant, change.id
            if change.settings is None:
                self.sessions.pop(key, None)
            else:
                first = [turn.tokens[0] for turn in change.turns]
                self.sessions[key] = self.sessions.get(key, [])[: change.kept] + first

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def store() -> Memory:
    return Memory()


@pytest.fixture
def sessions() -> SessionManager:
    policy = parse("full").resolve(100)
    return SessionManager(lambda spec: (policy, None), 60.0, 100)  # type: ignore[arg-type, return-value]


@pytest.fixture
def journal(sessions: SessionManager, store: Memory) -> Iterator[Journal]:
    journal = Journal(sessions, store, patience=0.3)
    yield journal
    store.open.set()
    journal.close(5)


def recovers(journal: Journal) -> bool:
    """Wait until the store works again; whether it does."""
    until = time.monotonic() + 5
    while journal.degraded and time.monotonic() < until:
        time.sleep(0.02)
    return not journal.degraded


def create(sessions: SessionManager, id: str) -> Session:
    sessions.create("default", id, None, None, None, {})
    return sessions._sessions["default", id]


def commit(sessions: SessionManager, session: Session, first: int) -> None:
    sessions.begin_turn(session.tenant, session.id).result()
    sessions.end_turn(session, [first, 0, 0], TurnRecord(2, 1, chat=False, seen=3))


def stored(journal: Journal, session: Session) -> bool:
    """Wait until the session is stored; whether it is."""
    told: list[bool] = []
    done = threading.Event()
    journal.when_stored(session, lambda durable: (told.append(durable), done.set())[1])
    until = time.monotonic() + 5
    while not done.wait(0.02) and time.monotonic() < until:
        journal.give_up()
    return told[0]


def test_what_changes_is_stored(sessions: SessionManager, journal: Journal, store: Memory) -> None:
    session = create(sessions, "a")
    for number in range(3):
        commit(sessions, session, number)
    assert stored(journal, session)
    assert store.sessions == {("default", "a"): [0, 1, 2]}
    sessions.rewind(session, 1)
    commit(sessions, session, 7)
    twin = sessions.fork(session, "b")
    sessions.end_turn(twin)
    assert stored(journal, twin)
    assert store.sessions == {("default", "a"): [0, 7], ("default", "b"): [0, 7]}
    sessions.update("default", "a", SessionChange(labels={"x": "y"}))
    sessions.remove("default", "b")
    assert stored(journal, session)
    assert store.writes[-1][-1].settings is not None
    assert dict(store.writes[-1][-1].settings.labels) == {"x": "y"}
    assert store.sessions == {("default", "a"): [0, 7]}
    assert not journal.degraded


def test_a_name_that_is_used_again(sessions: SessionManager, journal: Journal, store: Memory) -> None:
    store.open.clear()
    first = create(sessions, "a")
    commit(sessions, first, 1)
    time.sleep(0.05)  # it is being written
    commit(sessions, first, 2)
    sessions.remove("default", "a")
    second = create(sessions, "a")
    commit(sessions, second, 3)
    store.open.set()
    assert stored(journal, second)
    assert store.sessions == {("default", "a"): [3]}


def test_one_shot_sessions_are_not_stored(sessions: SessionManager, journal: Journal, store: Memory) -> None:
    alone = sessions.one_shot("default", None)
    sessions.end_turn(alone, [1, 2, 3], TurnRecord(2, 1, chat=False, seen=3))
    assert stored(journal, create(sessions, "a"))
    assert store.sessions.keys() == {("default", "a")}


def test_changes_that_come_together_are_one_write(
    sessions: SessionManager, journal: Journal, store: Memory
) -> None:
    store.open.clear()
    many = [create(sessions, f"s{number}") for number in range(20)]
    time.sleep(0.05)
    for number, session in enumerate(many):
        commit(sessions, session, number)
    store.open.set()
    assert stored(journal, many[-1])
    assert len(store.writes) <= 3
    assert all(store.sessions["default", f"s{number}"] == [number] for number in range(20))


def test_a_store_that_fails_is_told_and_made_good(
    sessions: SessionManager, journal: Journal, store: Memory
) -> None:
    session = create(sessions, "a")
    commit(sessions, session, 1)
    assert stored(journal, session)
    store.failing = True
    commit(sessions, session, 2)
    assert not stored(journal, session)
    assert journal.error == "the disk is full"
    began = time.monotonic()
    commit(sessions, session, 3)
    assert not stored(journal, session)
    assert time.monotonic() - began < 0.1, "nobody waits for a store that is known to fail"
    sessions.rewind(session, 2)
    commit(sessions, session, 4)
    store.failing = False
    assert recovers(journal)
    assert store.sessions == {("default", "a"): [1, 2, 4]}
    assert stored(journal, session)


def test_a_store_that_fails_is_not_tried_all_the_time(
    sessions: SessionManager, journal: Journal, store: Memory
) -> None:
    store.failing = True
    session = create(sessions, "a")
    assert not stored(journal, session)
    store.tries = 0
    for number in range(50):
        commit(sessions, session, number)
        time.sleep(0.005)
    assert store.tries <= 1
    store.failing = False
    assert recovers(journal)
    assert store.sessions == {("default", "a"): list(range(50))}


def test_a_fault_of_ours_is_told_without_what_it_says(
    sessions: SessionManager, journal: Journal, store: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(changes: Sequence[Change]) -> None:
        raise ValueError("tell nobody")

    with monkeypatch.context() as patch:
        patch.setattr(store, "write", fault)
        assert not stored(journal, create(sessions, "a"))
        assert journal.error == "a fault of ours (ValueError)"
    assert recovers(journal)


def test_a_store_that_forgot_is_given_everything_anew(
    sessions: SessionManager, journal: Journal, store: Memory
) -> None:
    one, other, gone = (create(sessions, id) for id in ("one", "other", "gone"))
    for number, session in enumerate((one, other, one, gone)):
        commit(sessions, session, number)
    sessions.remove("default", "gone")
    assert stored(journal, gone)
    assert store.sessions == {("default", "one"): [0, 2], ("default", "other"): [1]}
    store.forgetful = True
    commit(sessions, one, 7)
    assert not stored(journal, one)
    until = time.monotonic() + 5
    while journal.degraded and time.monotonic() < until:
        time.sleep(0.02)
    assert stored(journal, one)
    assert store.sessions == {("default", "one"): [0, 2, 7], ("default", "other"): [1]}


def test_a_store_that_hangs_is_waited_for_only_so_long(
    sessions: SessionManager, journal: Journal, store: Memory
) -> None:
    session = create(sessions, "a")
    assert stored(journal, session)
    store.open.clear()
    commit(sessions, session, 1)
    began = time.monotonic()
    assert not stored(journal, session)
    assert 0.25 < time.monotonic() - began < 2
    assert journal.error == "the store hangs"
    store.open.set()
    assert recovers(journal)
    assert stored(journal, session)
    assert store.sessions == {("default", "a"): [1]}


@pytest.mark.parametrize("hangs", [False, True])
def test_a_store_that_does_not_work_is_known_from_the_start(
    sessions: SessionManager, store: Memory, hangs: bool
) -> None:
    store.failing = not hangs
    if hangs:
        store.open.clear()
    began = time.monotonic()
    journal = Journal(sessions, store, patience=0.3)
    try:
        assert journal.degraded
        assert time.monotonic() - began < 2
        store.failing = False
        store.open.set()
        assert recovers(journal), "though nothing has changed"
        assert stored(journal, create(sessions, "a"))
    finally:
        store.open.set()
        journal.close(5)


def test_what_is_left_is_written_at_the_end(sessions: SessionManager, store: Memory) -> None:
    journal = Journal(sessions, store, patience=1)
    store.open.clear()
    session = create(sessions, "a")
    time.sleep(0.05)
    commit(sessions, session, 1)
    threading.Timer(0.1, store.open.set).start()
    journal.close(5)
    assert store.sessions == {("default", "a"): [1]}
    assert store.closed
