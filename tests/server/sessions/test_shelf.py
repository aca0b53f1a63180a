"""Which snapshots there are, at random: whatever fails, the budget holds, and what should go goes."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from apiary_server.sessions.session import Session, TurnRecord
from apiary_server.sessions.shelf import Shelf, _key, _name
from apiary_server.sessions.store import StoreError
from buzz import parse

BUDGET = 100


class Memory:
    """A store that fails when it is told to, and may be interrupted while it writes.

    Attributes:
        kept: bytes by name.
        peak: the most bytes that there were at once, what is being written included.
        failing: which of its methods fail how often; `late` ones after they did their work.
        failed: whether any did.
        meanwhile: done once, in the middle of the next write.
    """

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}
        self.peak = 0
        self.failing: Counter[str] = Counter()
        self.failed = False
        self.meanwhile: Callable[[], None] | None = None

    @property
    def size(self) -> int:
        return sum(map(len, self.kept.values()))

    def names(self) -> Mapping[str, int]:
        self._fail("names")
        return {name: len(data) for name, data in self.kept.items()}

    def write(self, name: str, parts: Sequence[bytes]) -> None:
        self._fail("write")
        data, (meanwhile, self.meanwhile) = b"".join(parts), (self.meanwhile, None)
        self.peak = max(self.peak, self.size + len(data))
        if meanwhile is not None:
            meanwhile()
        self.kept[name] = data
        self._fail("late write")

    def read(self, name: str, most: int) -> bytes | None:
        self._fail("read")
        data = self.kept.get(name)
        return data if data is None else data[:most]

    def delete(self, name: str) -> None:
        self._fail("delete")
        self.kept.pop(name, None)
        self._fail("late delete")

    def _fail(self, what: str) -> None:
        if self.failing[what]:
            self.failing[what] -= 1
            self.failed = True
            raise StoreError(f"the store fails: {what}")


class Talk:
    """A session, and what each of its turns was: a number that is drawn once."""

    def __init__(self, id: str, create_time: float) -> None:
        self.session = Session(id, "default", parse("full").resolve(100), None, create_time=create_time)  # type: ignore[arg-type]
        self.turns: list[int] = []
        self.policy = 0

    def commit(self, number: int) -> None:
        self.session.turns.append(TurnRecord(1, 1, chat=False, seen=1))
        self.turns.append(number)

    def says(self, turns: int) -> bytes:
        """What its snapshot after so many turns says."""
        return f"{self.policy} {self.turns[:turns]}".encode()

    def image(self, size: int) -> bytes:
        """A snapshot of it, of so many bytes or as many as it needs."""
        return self.says(len(self.turns)).ljust(size, b".")


class Shelves(RuleBasedStateMachine):
    """Against the store itself, and what each snapshot says of what it is."""

    @initialize(earlier=st.integers(0, 2))
    def start(self, earlier: int) -> None:
        self.store = Memory()
        self.earlier = earlier
        self.shelf = Shelf(self.store, BUDGET, earlier)
        self.ceiling = BUDGET  # of the store, if it had more than the budget at the start
        self.talks: list[Talk] = []
        self.recent: list[Talk] = []  # the least recently used first
        self.suspect: set[str] = set()  # names that the process before had yet to delete
        self.numbers = itertools.count()
        for id in "abc":
            self.create(id)

    @rule(id=st.sampled_from("abcd"))
    def create(self, id: str) -> None:
        if all(talk.session.id != id for talk in self.talks):
            self.talks.append(Talk(id, float(next(self.numbers))))

    @rule(
        place=st.integers(0, 9),
        size=st.integers(10, 60),
        again=st.booleans(),
        meanwhile=st.sampled_from(["", "", "rewind", "policy", "delete", "get"]),
    )
    @precondition(lambda self: self.talks)
    def put(self, place: int, size: int, again: bool, meanwhile: str) -> None:
        talk = self.talks[place % len(self.talks)]
        if not again or not talk.turns:
            talk.commit(next(self.numbers))
        image, epoch, turns = talk.image(size), talk.session.epoch, len(talk.turns)
        before = self.order()
        changes: dict[str, Callable[[], None]] = {
            "rewind": lambda: self.rewind(place, turns - 1),
            "policy": lambda: self.change_policy(place),
            "delete": lambda: self.delete(place),
            "get": lambda: self.get(place),
        }
        self.store.meanwhile, self.store.failed = changes.get(meanwhile), False
        try:
            kept = self.shelf.put(talk.session, epoch, turns, [image[:7], image[7:]])
        except StoreError:
            assert self.store.failed
        else:
            fits = len(image) <= self.shelf.budget
            assert kept == (meanwhile in ("", "get") and fits)
            if kept:
                self.suspect.discard(_name(_key(talk.session), turns))
                self.touch(talk)
                assert turns in self.shelf.turns(talk.session)
                assert len(self.shelf.turns(talk.session)) <= 1 + self.earlier
        finally:
            self.store.meanwhile = None
        others = [each for each in before if each is not talk and each in self.talks]
        gone = [each for each in others if _key(each.session) not in self.shelf._kept]
        assert gone == others[: len(gone)], "those used last were dropped first"

    @rule(places=st.lists(st.integers(0, 9), max_size=8), size=st.integers(10, 40))
    @precondition(lambda self: self.talks)
    def put_many(self, places: list[int], size: int) -> None:
        for place in places:
            self.put(place, size, again=False, meanwhile="")
            self.they_are_in_order()

    @rule(place=st.integers(0, 9), turns=st.integers(1, 5))
    @precondition(lambda self: self.talks)
    def rewind(self, place: int, turns: int) -> None:
        talk = self.talks[place % len(self.talks)]
        del talk.session.turns[turns:], talk.turns[turns:]
        talk.session.epoch += 1
        self.shelf.forget(talk.session, len(talk.turns))

    @rule(place=st.integers(0, 9))
    @precondition(lambda self: self.talks)
    def change_policy(self, place: int) -> None:
        talk = self.talks[place % len(self.talks)]
        talk.session.epoch += 1
        talk.policy += 1
        self.shelf.forget(talk.session)

    @rule(place=st.integers(0, 9))
    @precondition(lambda self: self.talks)
    def delete(self, place: int) -> None:
        talk = self.talks.pop(place % len(self.talks))
        talk.session.deleted = True
        self.shelf.forget(talk.session)

    @rule(place=st.integers(0, 9))
    @precondition(lambda self: self.talks)
    def refuse(self, place: int) -> None:
        talk = self.talks[place % len(self.talks)]
        for turns in self.shelf.turns(talk.session)[:1]:
            self.shelf.refuse(talk.session, turns)
            assert turns not in self.shelf.turns(talk.session)
            assert self.name(talk, turns) in self.store.kept, "another worker may have the right key"

    @rule(place=st.integers(0, 9))
    @precondition(lambda self: self.talks)
    def lose(self, place: int) -> None:
        talk = self.talks[place % len(self.talks)]
        for turns in self.shelf.turns(talk.session)[:1]:
            self.store.kept.pop(self.name(talk, turns), None)
            self.shelf.lose(talk.session, turns)
            assert turns not in self.shelf.turns(talk.session)
            self.shelf.refuse(talk.session, turns)
        assert not self.shelf._refused - {
            (key, turns) for key, sizes in self.shelf._kept.items() for turns in sizes
        }

    @rule(place=st.integers(0, 9))
    @precondition(lambda self: self.talks)
    def get(self, place: int) -> None:
        talk = self.talks[place % len(self.talks)]
        for turns in self.shelf.turns(talk.session):
            self.touch(talk)
            self.store.failed = False
            try:
                assert self.shelf.get(talk.session, turns, 5) == self.store.kept[self.name(talk, turns)][:5]
            except StoreError:
                assert self.store.failed

    @rule(
        what=st.sampled_from(["write", "late write", "read", "delete", "late delete"]),
        times=st.integers(1, 3),
    )
    def fail(self, what: str, times: int) -> None:
        self.store.failing[what] = times

    @rule()
    def mend_and_tidy(self) -> None:
        self.store.failing.clear()
        self.shelf.tidy()
        assert not self.shelf.tidy(), "there is nothing left"
        assert self.store.kept.keys() == self.names()
        self.ceiling = BUDGET

    @rule(budget=st.sampled_from([BUDGET, BUDGET, 50]), earlier=st.integers(0, 2))
    def restart(self, budget: int, earlier: int) -> None:
        self.suspect |= self.store.kept.keys() - self.names()
        self.ceiling = max(self.ceiling, self.store.size)
        self.shelf, self.earlier = Shelf(self.store, budget, earlier), earlier
        before = [talk for talk in self.recent if talk in self.talks]
        self.recent = before + [talk for talk in self.talks if talk not in before]
        self.shelf.take_up(talk.session for talk in self.recent)

    @invariant()
    def the_budget_holds(self) -> None:
        sizes = [len(self.store.kept[name]) for name in self.names()]
        assert self.shelf.used_bytes == sum(sizes) <= self.shelf.budget
        assert max(self.store.size, self.store.peak) <= self.ceiling
        self.store.peak = 0

    @invariant()
    def nothing_is_forgotten_in_the_store(self) -> None:
        assert self.store.kept.keys() <= self.names() | set(self.shelf._doomed)

    @invariant()
    def what_is_kept_is_of_what_the_sessions_are(self) -> None:
        for talk in self.talks:
            for turns in self.shelf.turns(talk.session):
                name = self.name(talk, turns)
                if name not in self.suspect:  # that would be refused, since it says what it is of
                    assert self.store.kept[name].rstrip(b".") == talk.says(turns)

    @invariant()
    def they_are_in_order(self) -> None:
        assert [talk for talk in self.recent if talk in self.order()] == self.order()
        assert len(self.shelf) == len(self.order())

    def touch(self, talk: Talk) -> None:
        self.recent = [each for each in self.recent if each is not talk] + [talk]

    def order(self) -> list[Talk]:
        """Those that have snapshots, the least recently used first, as the shelf has them."""
        of_key = {_key(talk.session): talk for talk in self.talks}
        return [of_key[key] for key in self.shelf._kept]

    def names(self) -> set[str]:
        """Of the snapshots that there are, those of no use included."""
        return {_name(key, turns) for key, sizes in self.shelf._kept.items() for turns in sizes}

    @staticmethod
    def name(talk: Talk, turns: int) -> str:
        return _name(_key(talk.session), turns)


TestShelves = Shelves.TestCase
TestShelves.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("parts", [[b"x" * 101], [b"x" * 60, b"y" * 41]])
def test_what_is_larger_than_the_budget_is_not_kept(parts: Sequence[bytes]) -> None:
    store, talk, other = Memory(), Talk("a", 1.0), Talk("b", 2.0)
    shelf = Shelf(store, BUDGET, 0)
    for each in (talk, other):
        each.commit(0)
    assert shelf.put(other.session, 0, 1, [b"small"])
    assert not shelf.put(talk.session, 0, 1, parts)
    assert store.size == 5, "and nothing is dropped for it"


def test_a_store_that_cannot_be_listed_is_told() -> None:
    store = Memory()
    store.failing["names"] = 1
    with pytest.raises(StoreError, match="names"):
        Shelf(store, BUDGET, 0).take_up([])


def test_other_files_are_left_alone() -> None:
    store = Memory()
    store.kept = {"README": b"mine", f"{'0' * 32}-1.snapshot": b"an orphan"}
    shelf = Shelf(store, BUDGET, 0)
    shelf.take_up([])
    shelf.tidy()
    assert store.kept.keys() == {"README"}
