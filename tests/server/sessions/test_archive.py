"""The archive over a store that refuses, hangs, is slow, or fails after its work: turns never wait for it,
what fails is told, and all is made good without anybody's help."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor

from apiary_server.engine.mailbox import settle
from apiary_server.sessions import archive as module
from apiary_server.sessions.archive import Archive
from apiary_server.sessions.info import RebuildReason
from apiary_server.sessions.manager import SessionManager
from apiary_server.sessions.pool import Geometry, SlotLayout
from apiary_server.sessions.session import Session, TurnRecord
from apiary_server.sessions.shelf import Shelf, _key
from apiary_server.sessions.snapshot import Image, Origin, history
from apiary_server.sessions.store import StoreError
from buzz import parse

POLICY = parse("full").resolve(100)
LAYOUT = SlotLayout.of(Geometry(layers=1, kv_heads=1, head_dim=2, dtype=torch.float32), POLICY, 4)
RETRY = 0.05


class Faulty:
    """A store in memory.

    Attributes:
        kept: names of what is there.
        refusing: sessions whose writes fail, with no trace; `late`: after they did their work.
        clinging: whether deletions fail.
        pause: seconds that each write takes.
        open: closed, all hang.
        tried: how often each session was to be written.
        meanwhile: done once, in the middle of the next deletion.
    """

    def __init__(self) -> None:
        self.kept: set[str] = set()
        self.refusing: list[Session] = []
        self.late: list[Session] = []
        self.clinging = False
        self.pause = 0.0
        self.open = threading.Event()
        self.open.set()
        self.tried: Counter[str] = Counter()
        self.meanwhile: Callable[[], object] | None = None
        self.closed = False

    def names(self) -> Mapping[str, int]:
        return dict.fromkeys(self.kept, 100)

    def write(self, name: str, parts: Sequence[bytes]) -> None:
        key = name.partition("-")[0]
        self.tried[key] += 1
        self.open.wait(20)
        time.sleep(self.pause)
        if key in map(_key, self.refusing):
            raise StoreError("no space left on device")
        self.kept.add(name)
        if key in map(_key, self.late):
            raise StoreError("it went away")

    def read(self, name: str, most: int) -> bytes | None:
        self.open.wait(20)
        return None

    def delete(self, name: str) -> None:
        self.open.wait(20)
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        if self.clinging:
            raise StoreError("operation not permitted")
        self.kept.discard(name)

    def close(self) -> None:
        self.closed = True


class Hive:
    """An archive over a faulty store, and what stands for the engine: a thread that copies caches.

    Attributes:
        busy: whether turns run.
    """

    def __init__(self, store: Faulty, delay: float = 0.0) -> None:
        self.store = store
        self.sessions = SessionManager(lambda spec: (POLICY, LAYOUT), 60.0, 100)
        self.shelf = Shelf(store, 2**20, 0)
        self.archive = Archive(self.sessions, self.shelf, Origin("model", "tokenizer"), None, delay)  # type: ignore[arg-type]
        self.busy = False
        self.broken = False
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def start(self) -> None:
        self.archive.start(self.call, self._copy, lambda: self.busy)

    def call(self, work: Callable[[], Image | None]) -> Future[Image | None]:
        outcome: Future[Image | None] = Future()
        self.post(lambda: settle(outcome, work))
        return outcome

    def post(self, command: Callable[[], None]) -> None:
        self._commands.put(command)

    def session(self, id: str, turns: int = 1) -> Session:
        """A session of so many turns."""
        self.sessions.create("default", id, None, None, None, {})
        session = self.sessions._sessions["default", id]
        for _ in range(turns):
            self.turn(session)
        return session

    def turn(self, session: Session) -> None:
        """Commit a turn."""
        self.sessions.begin_turn(session.tenant, session.id).result(0)
        seen = len(session.transcript) + 3
        session.cache = SimpleNamespace(seen=seen, n=seen)  # type: ignore[assignment]
        self.sessions.end_turn(session, [1, 2, 3], TurnRecord(2, 1, chat=False, seen=seen))

    def kept(self, *sessions: Session) -> bool:
        """Whether the store has the snapshots of these sessions as they are, and no others."""
        return self.store.kept == {f"{_key(each)}-{len(each.turns)}.snapshot" for each in sessions}

    def _run(self) -> None:
        while True:
            self._commands.get()()

    def _copy(self, session: Session, memory: Tensor) -> Image | None:
        if self.broken:
            raise ValueError("tell nobody")
        if session.busy:
            return None
        turns, none = session.cached_turns, memory[:0]
        return Image(str(POLICY), turns, session.epoch, history(session, turns), session.layout, None, none)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RETRY", RETRY)
    monkeypatch.setattr(module, "_PATIENCE", 0.2)


@pytest.fixture
def store() -> Iterator[Faulty]:
    store = Faulty()
    yield store
    store.open.set()


@pytest.fixture
def hive(store: Faulty) -> Iterator[Hive]:
    hive = Hive(store)
    hive.start()
    yield hive
    store.open.set()
    hive.archive.close(5)


def until(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def always(condition: Callable[[], bool], seconds: float) -> bool:
    return not until(lambda: not condition(), seconds)


def test_what_changes_gets_a_snapshot(hive: Hive) -> None:
    one, other = hive.session("one"), hive.session("other", 2)
    assert until(lambda: hive.kept(one, other))
    hive.turn(one)
    assert until(lambda: hive.kept(one, other))
    hive.sessions.remove("default", "other")
    assert until(lambda: hive.kept(one))
    assert hive.archive.error is None


@pytest.mark.parametrize("busy", [False, True])
def test_one_that_always_fails_keeps_no_other_from_its(hive: Hive, store: Faulty, busy: bool) -> None:
    hive.busy = busy
    bad = hive.session("bad", 0)
    store.refusing.append(bad)
    hive.turn(bad)
    assert until(lambda: hive.archive.error == "no space left on device")
    others = [hive.session(f"s{number}") for number in range(5)]
    assert until(lambda: hive.kept(*others))
    assert always(lambda: hive.archive.degraded, 3 * RETRY), "others are stored, and it is not"
    for each in others:
        hive.turn(each)
    assert until(lambda: not hive.archive.degraded or hive.kept(*others))
    assert hive.archive.degraded
    tried = store.tried[_key(bad)]
    assert until(lambda: store.tried[_key(bad)] > tried), "it is given up"
    store.refusing.clear()
    assert until(lambda: hive.kept(bad, *others))
    assert until(lambda: not hive.archive.degraded)


def test_who_is_in_a_hurry_is_not_told_to_wait_for_what_fails(hive: Hive, store: Faulty) -> None:
    bad, good = hive.session("bad", 0), hive.session("good", 0)
    store.refusing.append(bad)
    hive.turn(bad)
    assert until(lambda: hive.archive.degraded)
    assert not hive.archive.hurry(bad)
    assert not hive.archive.hurry(good), "the store failed a moment ago"
    hive.turn(good)
    assert until(lambda: hive.shelf.current(good))
    assert hive.archive.keeps(good)
    tried = store.tried[_key(bad)]
    assert until(lambda: store.tried[_key(bad)] > tried + 1)
    assert not hive.archive.hurry(bad)
    assert hive.archive.hurry(good), "it works for others"


def test_nothing_is_well_again_before_it_is(hive: Hive, store: Faulty) -> None:
    """On a full disk files can be deleted still, and a turn may run whenever a write is to be tried again."""
    session = hive.session("a", 0)
    store.refusing.append(session)
    hive.turn(session)
    assert until(lambda: hive.archive.degraded)
    hive.sessions.begin_turn("default", "a").result(0)
    gone = hive.session("gone")
    hive.sessions.remove("default", "gone")
    assert until(lambda: not hive.shelf.untidy)
    assert always(lambda: hive.archive.degraded, 3 * RETRY)
    store.refusing.clear()
    hive.sessions.end_turn(session)
    assert until(lambda: hive.kept(session) and not hive.archive.degraded)
    assert gone.deleted


def test_what_need_not_be_stored_any_more_is_no_error(hive: Hive, store: Faulty) -> None:
    session = hive.session("a", 0)
    store.refusing.append(session)
    with capture_logs() as logs:
        hive.turn(session)
        assert until(lambda: hive.archive.degraded)
        hive.sessions.remove("default", "a")
        assert until(lambda: not hive.archive.degraded)
        assert [entry["event"] for entry in logs] == ["caches are not stored: serving goes on"]
        other = hive.session("b")
        assert hive.archive.hurry(other)
        assert until(lambda: hive.kept(other))
        assert until(lambda: logs[-1]["event"] == "caches are stored again"), "now that one was"


def test_a_deletion_that_failed_is_tried_again(hive: Hive, store: Faulty) -> None:
    one, other = hive.session("one"), hive.session("other")
    assert until(lambda: hive.kept(one, other))
    store.clinging = True
    hive.sessions.remove("default", "one")
    assert until(lambda: hive.archive.error == "operation not permitted")
    assert always(lambda: hive.archive.degraded, 3 * RETRY)
    assert not hive.kept(other)
    store.clinging = False
    assert until(lambda: not hive.archive.degraded), "though nothing has changed"
    assert hive.kept(other)


def test_a_write_that_failed_after_its_work_leaves_nothing_behind(hive: Hive, store: Faulty) -> None:
    session = hive.session("a", 0)
    store.late.append(session)
    hive.turn(session)
    assert until(lambda: store.tried[_key(session)] > 1)
    assert not hive.shelf.current(session)
    hive.sessions.remove("default", "a")
    assert until(lambda: hive.kept() and not hive.shelf.untidy and not hive.archive.degraded)


def test_a_write_that_failed_after_its_work_is_made_again(hive: Hive, store: Faulty) -> None:
    session = hive.session("a", 0)
    store.late.append(session)
    hive.turn(session)
    assert until(lambda: hive.archive.error == "it went away")
    store.late.clear()
    assert until(lambda: hive.kept(session) and not hive.archive.degraded)
    assert hive.shelf.current(session)


def test_what_is_deleted_while_others_are_is_not_left(hive: Hive, store: Faulty) -> None:
    one, other = hive.session("one"), hive.session("other")
    assert until(lambda: hive.kept(one, other))
    store.meanwhile = lambda: hive.sessions.remove("default", "other")
    hive.turn(one)
    assert until(lambda: hive.kept(one))


def test_what_is_nobodys_is_deleted_at_the_start(store: Faulty) -> None:
    store.kept.add(f"{'0' * 32}-1.snapshot")
    hive = Hive(store)
    hive.shelf.take_up([])
    hive.start()
    assert until(lambda: not store.kept)
    hive.archive.close(5)


def test_a_fault_of_ours_is_told_without_what_it_says(hive: Hive) -> None:
    hive.broken = True
    session = hive.session("a")
    assert until(lambda: hive.archive.error == "a fault of ours (ValueError)")
    hive.broken = False
    assert until(lambda: hive.kept(session) and not hive.archive.degraded)


@pytest.mark.parametrize("what", ["write", "delete"])
def test_what_hangs_is_told_and_holds_nobody_up(hive: Hive, store: Faulty, what: str) -> None:
    one, other = hive.session("one"), hive.session("other")
    assert until(lambda: hive.kept(one, other))
    store.open.clear()
    if what == "write":
        hive.turn(one)
    else:
        hive.sessions.remove("default", "one")
    began = time.monotonic()
    assert hive.archive.error is None
    assert until(lambda: hive.archive.degraded)
    assert 0.15 < time.monotonic() - began < 2
    assert hive.archive.error == "the store hangs"
    began = time.monotonic()  # what the engine thread does, meanwhile
    hive.turn(other)
    assert not hive.archive.hurry(other)
    assert not hive.archive.keeps(other)
    assert hive.archive.read(other) == (None, RebuildReason.SNAPSHOT_CORRUPT)
    hive.archive.forget(other)
    hive.session("new")
    assert hive.shelf.used_bytes >= 0
    assert time.monotonic() - began < 1
    hive.sessions.remove("default", "new")
    store.open.set()
    left = [other] if what == "delete" else [one, other]
    assert until(lambda: hive.kept(*left) and not hive.archive.degraded)


def test_a_slow_store_takes_nothing_from_the_engine(hive: Hive, store: Faulty) -> None:
    store.pause = 0.1
    sessions = [hive.session(f"s{number}") for number in range(5)]
    slowest = 0.0
    while not hive.kept(*sessions):
        began = time.monotonic()
        done = threading.Event()
        hive.post(done.set)
        assert done.wait(5)
        slowest = max(slowest, time.monotonic() - began)
    assert slowest < 0.08
    assert hive.archive.error is None, "slow is not broken"


def test_at_the_end_each_that_is_missing_is_tried_once(store: Faulty) -> None:
    hive = Hive(store, delay=60)
    hive.start()
    good, bad, late = ([hive.session(f"{kind}{number}") for number in range(3)] for kind in "gbl")
    store.refusing += bad
    store.late += late
    assert not store.tried
    hive.archive.close(5)
    assert store.tried == Counter(map(_key, good + bad + late))
    assert hive.kept(*good), "what failed after its work is deleted again"
    assert all(hive.shelf.current(session) for session in good)
    assert store.closed


def test_the_end_comes_however_slow_the_store_is(store: Faulty) -> None:
    hive = Hive(store, delay=60)
    hive.start()
    sessions = [hive.session(f"s{number}") for number in range(20)]
    store.pause = 0.1
    began = time.monotonic()
    hive.archive.close(0.35)
    assert time.monotonic() - began < 1
    assert until(lambda: not hive.archive._thread.is_alive())
    assert sum(map(hive.shelf.current, sessions)) == len(store.tried)
    assert 3 <= len(store.tried) <= 4


def test_the_end_comes_though_the_store_hangs(store: Faulty) -> None:
    hive = Hive(store, delay=60)
    hive.start()
    hive.session("a")
    store.open.clear()
    began = time.monotonic()
    hive.archive.close(0.2)
    assert time.monotonic() - began < 1
    assert not store.closed, "it is in use still"
