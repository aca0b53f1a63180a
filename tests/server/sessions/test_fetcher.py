"""Reads that nobody has to wait for."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from apiary_server.sessions import fetcher as module
from apiary_server.sessions.fetcher import Fetcher, Found
from apiary_server.sessions.info import RebuildReason
from apiary_server.sessions.session import Session
from buzz import parse

LOST = (None, RebuildReason.SNAPSHOT_CORRUPT)


class Store:
    """What is read: nothing, for a reason of each session's; `hang` has it wait until `open`."""

    def __init__(self) -> None:
        self.read_of: list[str] = []
        self.open = threading.Event()
        self.open.set()
        self.begun = threading.Event()

    def read(self, session: Session) -> Found:
        self.read_of.append(session.id)
        self.begun.set()
        self.open.wait(20)
        if session.id == "fault":
            raise ValueError("tell nobody")
        return None, RebuildReason.REWOUND


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def woken() -> Counter[str]:
    return Counter()


@pytest.fixture
def fetcher(store: Store, woken: Counter[str]) -> Fetcher:
    fetcher = Fetcher(store.read)
    fetcher.start(lambda: woken.update(["woken"]))
    return fetcher


def talk(id: str) -> Session:
    layout: Any = None
    return Session(id, "default", parse("full").resolve(100), layout)


def test_one_after_the_other(fetcher: Fetcher, store: Store, woken: Counter[str]) -> None:
    asked = [fetcher.fetch(talk(id)) for id in "abc"]
    assert [each.result(5) for each in asked] == [(None, RebuildReason.REWOUND)] * 3
    assert store.read_of == ["a", "b", "c"]
    until(lambda: woken["woken"] == 3)


def test_whoever_leaves_has_nothing_read(fetcher: Fetcher, store: Store) -> None:
    store.open.clear()
    first, left, last = (fetcher.fetch(talk(id)) for id in "abc")
    assert store.begun.wait(5)
    assert left.cancel()
    assert not first.cancel()
    store.open.set()
    assert last.result(5)
    assert store.read_of == ["a", "c"]


def test_a_fault_of_ours_is_no_end(fetcher: Fetcher) -> None:
    assert fetcher.fetch(talk("fault")).result(5) == LOST
    assert fetcher.fetch(talk("a")).result(5) != LOST


def test_what_hangs_is_given_up_until_it_ends(
    fetcher: Fetcher, store: Store, woken: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.1)
    store.open.clear()
    hung, behind, left = (fetcher.fetch(talk(id)) for id in "abc")
    left.cancel()
    assert (hung.result(5), behind.result(5)) == (LOST, LOST)
    until(lambda: woken["woken"] == 1)
    assert fetcher.fetch(talk("d")).result(0) == LOST, "at once"
    store.open.set()
    until(lambda: woken["woken"] == 2)
    assert hung.result(0) == LOST, "as it was told"
    assert fetcher.fetch(talk("e")).result(5) != LOST
    assert store.read_of == ["a", "e"]


def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        threading.Event().wait(0.005)
    raise AssertionError("it takes too long")
