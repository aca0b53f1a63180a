"""Cancels by the hundred, wherever a turn is: a step later it is as if the turn had never been. What a caller
keeps is as if it had been the whole answer, and a cancel that comes too late changes nothing."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable

import pytest

from apiary_server.engine.engine import Engine
from apiary_server.engine.request import TurnRequest
from apiary_server.engine.turn import Turn
from tests.server.driver import Reader, alike, ask, begin, create, request, same, session, state, step

MakeEngine = Callable[..., Engine]
WORKSPACE, SLOT = 86_144, 14_080  # bytes; of the default policy
BUZZ = "buzz(sink=2,window=8,threshold=20)"
ROUNDS = [  # policy, slots that there are, tokens of prompts
    (BUZZ, 60, (40, 120, 270)),  # who waits, waits for a place
    (BUZZ, 5, (40, 120, 270)),  # for memory
    ("full(bound=1000)", 60, (40, 70, 120)),
    ("h2o(heavy=10,recent=10,block=4)", 60, (40, 120, 270)),
    ("buzz(sink=2,window=8,threshold=20,positions=original)", 60, (40, 120, 270)),
]
PHASES = ("queue", "prefill", "decode", "commit")


def phase(turn: Turn | None) -> str:
    """Where a turn is; one that the loop has not seen yet is None."""
    if turn is None or turn.started is None:
        return "queue"
    if turn.replaying or turn.generated == turn.max_tokens - 1:  # the next step makes its last token
        return "commit"
    return "decode" if turn.decoding else "prefill"


class Twins:
    """Two engines with one session each and somebody's endless answer beside it. In one of them turns are
    cancelled, the other has only those that are left."""

    def __init__(self, make_engine: MakeEngine, number: int, *, keep: bool) -> None:
        policy, slots, self.lengths = ROUNDS[number % len(ROUNDS)]
        self.rng = random.Random(number)
        self.keep = keep
        self.engine, self.calm = (
            make_engine(
                start=False,
                cache_budget=WORKSPACE + slots * SLOT,
                parked_budget=0,
                max_running=4,
                step_tokens=32,
                decode_slowdown=1000,
            )
            for _ in range(2)
        )
        self.pool, self.scheduler = self.engine._loop.residency.pool, self.engine._loop._scheduler
        for each in (self.engine, self.calm):
            create(each, "a", policy)
        self.others = [begin(each, request("hum", max_tokens=30_000)) for each in (self.engine, self.calm)]
        step(self.engine)
        step(self.calm)

    def cancel(self, aim: str) -> tuple[str, str]:
        """Cancel a turn in some phase and see what it leaves. Returns where it was and what came of it."""
        before = state(session(self.engine, "a"))
        lengths = self.lengths if aim == "prefill" else (5, *self.lengths)  # the shortest is one chunk
        prompt = [self.rng.randrange(3, 259) for _ in range(self.rng.choice(lengths))]
        fields = {"max_tokens": self.rng.randrange(8, 31), "keep": self.keep}
        if aim == "commit" and self.rng.random() < 0.5:
            fields["stop"] = self.stop(request(prompt, "a", **fields))
        blockers = self.block() if aim == "queue" and self.rng.random() < 0.7 else []
        leased = self.pool.leased_bytes
        reader = begin(self.engine, request(prompt, "a", **fields), reads=False)
        self.drive(aim, waits=bool(blockers))
        turn, taken = self.turn, self.read(reader)
        where = phase(turn)
        if where == "commit" and turn is not None and not turn.replaying:
            self.close_within_the_step(turn, reader)
        else:
            reader.close()
            step(self.engine)
        for _ in range(len(prompt) + 40 if taken else 0):  # what was read may have to be computed again
            if reader.ended:
                break
            step(self.engine)
        assert reader.ended
        assert self.turn is None
        assert not session(self.engine, "a").busy
        assert len(self.pool._free_workspaces) == self.pool.workspaces
        if reader.error is None:  # it came too late
            assert where == "commit"
            outcome = "committed"
            ask(self.calm, prompt, "a", **fields)
        elif taken:
            assert "what was delivered is kept" in reader.error.message
            outcome = "kept"
            end = (reader.token_ids[taken],)
            ask(self.calm, prompt, "a", max_tokens=taken + 1, stop_token_ids=end)
        else:
            assert "was rolled back" in reader.error.message
            outcome = "rolled back"
            assert same(before, state(session(self.engine, "a"))), where
            assert self.pool.leased_bytes == leased
        for blocker in blockers:
            blocker.close()
        step(self.engine)
        self.compare()
        return where, outcome

    def go_on(self) -> None:
        """The next turn is the same in both."""
        one, other = (ask(each, [40, 41, 42], "a", max_tokens=12) for each in (self.engine, self.calm))
        assert one.token_ids == other.token_ids
        self.compare()

    def compare(self) -> None:
        """What is committed is the same in both, and nothing else is held."""
        one, other = (session(each, "a") for each in (self.engine, self.calm))
        assert one.transcript == other.transcript
        turns = [
            [
                (turn.prompt_tokens, turn.completion_tokens, turn.seen, turn.evicted_entries)
                for turn in each.turns
            ]
            for each in (one, other)
        ]
        assert turns[0] == turns[1]
        ignored = {"turns": None, "update_time": None}
        assert alike(state(one) | ignored, state(other) | ignored)
        assert self.pool.leased_bytes == self.calm._loop.residency.pool.leased_bytes
        self.pool.check_integrity()

    def end(self) -> None:
        """When all are gone, so is their memory."""
        assert not any(other.ended for other in self.others)
        self.others[0].close()
        self.engine.keeper.delete("default", "a")
        step(self.engine)
        self.engine._loop.residency.check_integrity()
        assert self.engine.capacity().used_bytes == self.engine.capacity().workspace_bytes

    @property
    def turn(self) -> Turn | None:
        """The session's turn in flight."""
        return next((turn for turn in self.scheduler.turns() if turn.session.id == "a"), None)

    def drive(self, aim: str, *, waits: bool) -> None:
        """Step until the turn is where it is to be cancelled."""
        if aim == "queue":
            step(self.engine, self.rng.randrange(3) if waits else 0)
            return
        while phase(self.turn) == "queue":
            step(self.engine)
        turn = self.turn
        assert turn is not None
        if aim == "prefill":
            computed = self.rng.randrange(turn.prompt_end - 32)
            while turn.computed < computed:
                step(self.engine)
        elif aim == "decode":
            generated = self.rng.randrange(1, turn.max_tokens - 1)
            while turn.generated < generated:
                step(self.engine)
        else:
            while phase(turn) != "commit":
                step(self.engine)
            if turn.replaying:
                step(self.engine, self.rng.randrange(1 + turn.remaining // 32))

    def close_within_the_step(self, turn: Turn, reader: Reader) -> None:
        """Cancel while the step runs that commits the turn."""
        owner, name = self.rng.choice(
            [(self.engine._loop.runner, "run"), (turn.transaction, "commit"), (reader, "put")]
        )
        work = getattr(owner, name)

        def closing(*args: object) -> object:
            reader.close()
            return work(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, closing)
            step(self.engine)
        assert reader.closed

    def read(self, reader: Reader) -> int:
        """Have the reader take some tokens before it goes; how many of them stay. The one after them is new
        in the answer, so that the other engine can be told to stop there."""
        ids = reader.token_ids
        most = self.rng.randrange(len(ids)) if ids else 0
        reader.read(max(count for count in range(most + 1) if not count or ids[count] not in ids[:count]))
        return reader._taken if self.keep else 0

    def stop(self, asked: TurnRequest) -> tuple[str, ...]:
        """A stop string of several tokens that the answer will have, so that it is computed again without
        them; none if it has none."""
        reader = begin(self.engine, asked.model_copy(update={"keep": False}))
        while self.turn is None or self.turn.generated < self.turn.max_tokens - 1:
            step(self.engine)
        reader.close()
        step(self.engine)
        found = re.search("[ -~]{2}", reader.text[1:])
        return (found[0],) if found else ()

    def block(self) -> list[Reader]:
        """Begin turns until one has to wait."""
        blockers = []
        while not self.scheduler.waiting:
            blockers.append(begin(self.engine, request("another", max_tokens=1000)))
            step(self.engine)
        return blockers


@pytest.mark.parametrize("keep", [False, True])
def test_cancels_in_every_phase(make_engine: MakeEngine, keep: bool) -> None:
    phases, outcomes = Counter[str](), Counter[str]()
    for number in range(50):
        twins = Twins(make_engine, number, keep=keep)
        for place in range(10):
            where, outcome = twins.cancel(PHASES[phases.total() % 4])
            phases[where] += 1
            outcomes[outcome] += 1
            if place % 5 == 4:
                twins.go_on()
        twins.end()
    assert phases.total() == 500
    assert min(phases[name] for name in PHASES) >= 50, phases
    assert outcomes["rolled back"] >= 200, outcomes
    assert (outcomes["kept"] >= 50) == keep, outcomes
