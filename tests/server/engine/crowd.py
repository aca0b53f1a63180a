"""Those who use an engine's sessions, what they asked and were told, and whether that was as it must be."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

import pytest
import torch

from apiary_server import errors
from apiary_server.engine.engine import Engine
from apiary_server.sessions.info import RebuildReason
from apiary_server.sessions.session import Session
from tests.server.driver import Reader, one_step, request, same, session, state, wake
from tests.server.engine.mortal import Mortal
from tests.server.engine.told import NOTHING, Asked, Reasons, Told
from tests.twin import Twin

T = TypeVar("T")
PATIENCE = 20.0  # seconds for what takes milliseconds
_crowds = itertools.count()


class Crowd:
    """Steps an engine by hand, and hears at each step which turns ended, and how.

    Args:
        mortal: the engine.
        twin: goes the same ways.
        ample: whether a store has room for all their caches.
        happened: how often what did; goes on there.

    Attributes:
        mortal: as given.
        twin: as given.
        told: what is known of each session.
        running: the turns in flight, in the order in which they came.
        parted: sessions that went another way than the twin's, where two tokens were tied.
        happened: as given.
    """

    def __init__(self, mortal: Mortal, twin: Twin, ample: bool, happened: Counter[object]) -> None:
        self.mortal = mortal
        self.twin = twin
        self.told: dict[str, Told] = {}
        self.running: list[Asked] = []
        self.parted: set[str] = set()
        self.happened = happened
        self._ample = ample
        self._crowd = next(_crowds)
        self._ids = (f"s{number}" for number in itertools.count())

    @property
    def engine(self) -> Engine:
        """The one that lives."""
        return self.mortal.engine

    def new_id(self) -> str:
        """One that no session had."""
        return next(self._ids)

    def name(self, id: str) -> str:
        """Of a session's twin."""
        return f"{self._crowd}-{id}"

    # what they do

    def create(self, policy: str | None) -> None:
        """Add a session.

        Raises:
            InvalidField: the engine cannot hold it.
        """
        id = self.new_id()
        info = self.outcome(self.engine.keeper.create("default", id, policy, None, None, {}))
        self.told[id] = Told(info.policy)
        self.twin.create(self.name(id), policy)

    def ask(self, id: str, length: int, max_tokens: int, keep: bool, wait: bool) -> None:
        """Ask for a turn of a session, with so many tokens of prompt."""
        prompt = [3 + (i * 7 + max_tokens) % 250 for i in range(length)]
        record, told, reader = session(self.engine, id), self.told[id], Reader()
        before = None if record.busy else state(record)
        asked = request(prompt, id, max_tokens=max_tokens, keep=keep, wait=wait)
        try:
            queued = self.engine.open(asked, reader)
        except errors.SessionBusy:
            assert self.is_taken(id)
            assert not wait
        except errors.ContextFull:
            assert told.is_full(length)
            assert before is not None
            assert same(before, state(record))
        else:
            assert wait or not self.is_taken(id)
            self.running.append(Asked(id, prompt, max_tokens, keep, reader, queued, before))

    def between_turns(self, id: str, begin: Callable[[], Future[T]]) -> T | None:
        """What becomes of a session's change; None if a turn is in flight. Turns that nobody waits for any
        more end before."""
        if self.is_taken(id):
            with pytest.raises(errors.SessionBusy):
                begin()
            return None
        for asked in self.of(id):
            asked.before = None  # when it is seen to have ended, the session may have changed already
        return self.outcome(begin())

    def delete(self, id: str) -> None:
        """Take a session away."""
        self.forget(id)
        self.outcome(self.engine.keeper.delete("default", id))

    def forget(self, id: str) -> None:
        """A session is there no more."""
        del self.told[id]
        self.parted.discard(id)
        self.twin.delete(self.name(id))

    def meet_again(self, warm: bool, reasons: Reasons) -> None:
        """Another engine starts, where all must be that was durable. It may have to compute caches anew that
        were there, for these reasons; with `warm` it brings some before anybody asks."""
        self.running.clear()
        self.note_moves()
        self.mortal.begin()
        if warm:
            self.engine._restorer.start(lambda: bool(self.running))
        self.step()  # those that have expired go
        assert self.engine.sessions._sessions.keys() == {("default", id) for id in self.told}
        for id, told in self.told.items():
            info = self.engine.sessions.get("default", id)
            assert info.policy == told.policy
            assert told.durable <= info.turn_count <= len(told.turns)
            self.happened["turns that were not durable"] += len(told.turns) - info.turn_count
            if told.reasons != NOTHING:  # there was no cache, or not all of it
                told.reasons |= {RebuildReason.RESTARTED}
            told.cut(info.turn_count, {RebuildReason.RESTARTED})
            if told.turns:
                told.reasons |= reasons
            self.twin.rewind(self.name(id), info.turn_count)

    def note_moves(self) -> None:
        """Count what the engine moved; it is at its end."""
        self.happened.update(self.engine.moves())

    # how it goes on

    def of(self, id: str) -> Iterator[Asked]:
        """The turns of a session that are in flight."""
        return (asked for asked in self.running if asked.id == id)

    def is_taken(self, id: str) -> bool:
        """Whether somebody waits for a turn of a session."""
        return any(not asked.reader.closed for asked in self.of(id))

    def outcome(self, change: Future[T]) -> T:
        """What a change of a session comes to."""
        self.until(change.done)
        return change.result()

    def until(self, done: Callable[[], bool]) -> None:
        """Step until it is done."""
        end = time.monotonic() + PATIENCE
        while not done():
            assert time.monotonic() < end, "it takes too long"
            self.step()

    def steps(self, count: int) -> None:
        """Step while there are turns, so often at the most."""
        for _ in range(count):
            if self.running:
                self.step()

    def step(self) -> None:
        """Step, and hear what came of it."""
        wake(self.engine)
        with torch.inference_mode():
            one_step(self.engine)
        self.hear()

    def hear(self) -> None:
        """Hear which turns ended, and how."""
        for asked in list(self.running):
            record = self.engine.sessions._sessions.get(("default", asked.id))
            end = time.monotonic() + PATIENCE
            while not asked.ended and self._is_over(asked, record) and time.monotonic() < end:
                time.sleep(0.0002)  # it is being stored
            if asked.ended:
                self.running.remove(asked)
                self.happened[type(asked.error)] += 1
                if record is not None and asked.id in self.told:
                    self._check_end(asked, self.told[asked.id], record)

    def _is_over(self, asked: Asked, record: Session | None) -> bool:
        """Whether a turn, the first of its session that is in flight, is over, though nobody was told. Where
        the session is gone it may take more steps."""
        if record is None or asked.id not in self.told:
            return False
        return not record.busy or len(record.turns) > len(self.told[asked.id].turns)

    def _check_end(self, asked: Asked, told: Told, record: Session) -> None:
        error = asked.error
        cut = isinstance(error, (errors.Cancelled, errors.Draining))
        kept = cut and asked.keep and asked.reader.token_ids
        if error is None or kept:
            self._check_answer(asked, told, record)
            return
        if isinstance(error, errors.Cancelled):
            assert asked.reader.closed
        elif isinstance(error, errors.ContextFull):
            assert told.is_full(len(asked.prompt))
        elif isinstance(error, errors.BudgetExhausted):
            assert not self.mortal.lasts, "a turn is refused for room, though there is a store"
        else:
            assert isinstance(error, errors.Draining), error
        if asked.before is not None and not record.busy:
            now = state(record)
            if "keys" in now and "keys" in asked.before:
                assert same(asked.before, now), "a turn that did not commit left a trace"

    def _check_answer(self, asked: Asked, told: Told, record: Session) -> None:
        """A turn was committed: it must be as the twin's, and say what was computed anew."""
        token_ids, place, name = asked.reader.token_ids, len(told.turns), self.name(asked.id)
        usage, reasons = asked.usage, self._reasons(told)
        told.commit([*asked.prompt, *token_ids], durable=usage is not None and usage.durable)
        if asked.id in self.parted:
            return
        taken = len(token_ids) if usage is None else None
        expected, twin = self.twin.ask(name, asked.prompt, asked.max_tokens, taken), self.twin.record(name)
        assert expected.agrees(token_ids)
        if expected.token_ids != token_ids:
            self.happened["ties"] += 1
            self.parted.add(asked.id)
            return
        assert record.turns[place].seen == twin.turns[place].seen
        if record.cache is not None and twin.cache is not None and not record.busy:
            assert record.cache.state() == twin.cache.state()
        if usage is not None:
            self.happened[usage.rebuild_reason] += 1
            assert usage.rebuild_reason in reasons
            anew = expected.cached_tokens - usage.cached_tokens
            assert anew == 0 if usage.rebuild_reason is None else anew > 0
            assert usage.durable == self.mortal.lasts or self.mortal.dead

    def _reasons(self, told: Told) -> Reasons:
        """What a session's next turn may say of its cache."""
        evicts = self.mortal.lasts and not self._ample and told.turns
        return told.reasons | ({RebuildReason.SNAPSHOT_EVICTED} if evicts else set())
