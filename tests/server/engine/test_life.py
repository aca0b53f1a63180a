"""Sessions' life at random: create, turn, cancel at any moment, fork, change the policy, rewind, delete,
expire, and restarts of the engine, in order or as if it was killed.

At every step each session has just the turns that were told, and the budgets hold. A turn leaves nothing, or
just what was read; its answer is that of an engine to which nothing happens, and it says what was computed
anew. When all sessions are gone so is their memory, and what was stored of them.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from apiary_server import errors
from apiary_server.engine.engine import Engine
from apiary_server.model.loader import LoadedModel
from apiary_server.sessions.info import RebuildReason
from apiary_server.sessions.pool import Geometry, SlotLayout
from apiary_server.sessions.request import SessionChange
from apiary_server.settings import Settings
from apiary_server.worker import load_model
from buzz import parse
from tests import tiny
from tests.server.driver import Reader, request, session
from tests.server.engine.crowd import PATIENCE, Crowd
from tests.server.engine.mortal import Mortal
from tests.server.engine.told import NOTHING, Reasons
from tests.twin import Twin

DEFAULT = "buzz(sink=2,window=8,threshold=20,stride=5)"
SMALL = [
    None,
    "buzz(sink=0,window=0,threshold=9,stride=3)",
    "buzz(sink=2,window=8,threshold=30,positions=original)",
    "streaming(sink=2,window=20,block=4)",
    "h2o(heavy=8,recent=8,block=3)",
    "corm(budget=40,recent=8,queries=8)",
    "buzz2(sink=2,window=8,hot=10,cells=8)",
]
LARGE = [  # their slots may be too large
    "full(bound=90)",
    "h2o(heavy=24,recent=40,block=8,kivi=4,residual=4)",
    "buzz(sink=2,window=8,threshold=60,kivi=2,residual=0,positions=original)",
    "full(bound=90,kivi=4,residual=8)",
]
POLICIES = st.sampled_from(SMALL + LARGE)
GEOMETRY = Geometry(layers=2, kv_heads=2, head_dim=32, dtype=torch.float32)
WORKSPACE = SlotLayout.of_workspace(GEOMETRY, 256).bytes
SLOT = SlotLayout.of(GEOMETRY, parse(DEFAULT), slack=16).bytes
AMPLE = 2**30  # bytes
ANSWERS: dict[str, object] = {"policy": DEFAULT, "workspace_entries": 256, "slack": 16}  # what they depend on
MOST = 12  # sessions
WHICH = st.integers(0, MOST - 1)  # of the sessions that there are: how many depends on how fast threads are
TURN = st.fixed_dictionaries(
    {
        "id": WHICH,
        "length": st.sampled_from([1, 5, 40, 120, 700]),
        "max_tokens": st.integers(1, 20),
        "keep": st.booleans(),
        "wait": st.booleans(),
        "steps": st.integers(0, 30),
    }
)


def deed(**strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A rule: what is done, after some turns were asked for. What is drawn must not depend on what happens,
    which depends on threads."""

    def decorate(do: Callable[..., None]) -> Callable[..., None]:
        def run(life: Life, turns: list[dict[str, Any]], **drawn: Any) -> None:
            for turn in turns:
                life.turn(**turn | {"id": life.which(turn["id"])})
            if "id" in drawn:
                drawn["id"] = life.which(drawn["id"])
            do(life, **drawn)

        run.__name__ = do.__name__
        return rule(turns=st.lists(TURN, max_size=3), **strategies)(run)

    return decorate


class Life(RuleBasedStateMachine):
    """A state directory, in most lives, and a crowd.

    Attributes:
        happened: how often what did, in all lives.
    """

    model: Path
    loaded: LoadedModel
    twin: Twin
    happened: Counter[object]
    crowd: Crowd | None = None

    @initialize(
        slots=st.integers(4, 9),
        parked=st.sampled_from([0, 1, 4]),
        stored=st.sampled_from([None, 6 * SLOT, AMPLE, AMPLE]),
        durability=st.sampled_from(["turn", "idle"]),
        checkpoints=st.sampled_from([0, 2]),
        step_tokens=st.sampled_from([7, 64, 256]),
        running=st.integers(1, 6),
        policies=st.lists(POLICIES, min_size=1, max_size=6),
    )
    def begin(
        self,
        slots: int,
        parked: int,
        stored: int | None,
        durability: str,
        checkpoints: int,
        step_tokens: int,
        running: int,
        policies: list[str | None],
    ) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="life-"))
        self.stored = stored
        store = {
            "state_dir": self.directory,
            "stored_budget": stored,
            "durability": durability,
            "checkpoints": checkpoints,
        }
        settings = Settings.load(
            model=str(self.model),
            cache_budget=WORKSPACE + slots * SLOT,
            parked_budget=parked * SLOT,
            step_tokens=step_tokens,
            max_running=running,
            threads=1,
            store_patience=PATIENCE,
            **ANSWERS,
            **({} if stored is None else store),
        )
        self.mortal = Mortal(self.loaded, settings)
        self.crowd = Crowd(self.mortal, self.twin, stored == AMPLE, self.happened)
        self.told, self.running = self.crowd.told, self.crowd.running
        for policy in policies:
            self.create(policy)

    @property
    def engine(self) -> Engine:
        return self.mortal.engine

    def which(self, number: int) -> str:
        """One of the sessions that there are."""
        if not self.told:
            self.create(None)
        return sorted(self.told)[number % len(self.told)]

    def create(self, policy: str | None) -> None:
        try:
            self.crowd.create(policy)
        except errors.InvalidField:
            assert policy in LARGE

    def turn(self, steps: int, **fields: Any) -> None:
        self.crowd.ask(**fields)
        self.crowd.steps(steps)

    @deed(steps=st.integers(1, 60))
    def wait(self, steps: int) -> None:
        self.crowd.steps(steps)

    @deed(policy=POLICIES)
    def add(self, policy: str | None) -> None:
        if len(self.told) < MOST:
            self.create(policy)

    @deed(which=WHICH)
    def cancel(self, which: int) -> None:
        if self.running:
            self.running[which % len(self.running)].reader.close()
            self.crowd.step()

    @deed(id=WHICH)
    def fork(self, id: str) -> None:
        if len(self.told) == MOST:
            return
        new = self.crowd.new_id()
        try:
            forked = self.crowd.between_turns(id, lambda: self.engine.keeper.fork("default", id, new))
        except errors.BudgetExhausted:
            self.happened["no room for a fork"] += 1
            with pytest.raises(errors.SessionNotFound):
                self.engine.sessions.get("default", new)
            return
        if forked is not None:
            self.told[new] = self.told[id].fork()
            self.twin.fork(self.crowd.name(id), self.crowd.name(new))
            assert forked.token_count == len(self.told[new].transcript)

    @deed(id=WHICH, policy=POLICIES.filter(bool))
    def change_policy(self, id: str, policy: str) -> None:
        told, change = self.told[id], SessionChange(policy=policy)
        try:
            changed = self.crowd.between_turns(id, lambda: self.engine.keeper.update("default", id, change))
        except (errors.InvalidField, errors.ContextFull):
            assert policy in LARGE
            assert str(session(self.engine, id).policy) == told.policy
            return
        if changed is not None:
            told.change(changed.policy)
            self.twin.change(self.crowd.name(id), policy)

    @deed(id=WHICH, most=st.integers(0, 3))
    def rewind(self, id: str, most: int) -> None:
        told, count = self.told[id], min(most, len(self.told[id].turns))
        rewound = self.crowd.between_turns(id, lambda: self.engine.keeper.rewind("default", id, count))
        if rewound is not None:
            assert rewound.turn_count == count
            earlier = NOTHING if self.mortal.lasts else set()  # an earlier snapshot may be there
            told.cut(count, {RebuildReason.REWOUND} | earlier)
            self.twin.rewind(self.crowd.name(id), count)

    @deed(id=WHICH)
    def delete(self, id: str) -> None:
        self.crowd.delete(id)

    @deed(id=WHICH)
    def expire(self, id: str) -> None:
        if any(self.crowd.of(id)):
            return
        record = session(self.engine, id)
        self.crowd.outcome(self.engine.keeper.update("default", id, SessionChange(ttl=0.001)))
        self.crowd.forget(id)
        time.sleep(0.001)
        if not record.busy:  # else its cache is being brought back
            with pytest.raises(errors.SessionNotFound):
                self.engine.sessions.get("default", id)
        self.crowd.until(lambda: ("default", id) not in self.engine.sessions._sessions)

    @deed(grace=st.sampled_from([0.0, 0.0, 0.05]), warm=st.booleans())
    def restart(self, grace: float, warm: bool) -> None:
        """The engine ends in order: all is stored."""
        if not self.mortal.lasts:
            return
        self.engine.drain()
        with pytest.raises(errors.Draining):
            self.engine.open(request([3], None), Reader())
        self.mortal.end(grace)
        self.crowd.hear()
        end = time.monotonic() + 5
        while self.running and time.monotonic() < end:  # it was on its way to the queue
            time.sleep(0.005)
            self.crowd.hear()
        assert not self.running, "a turn was neither committed nor rolled back"
        # what a turn on its way let go at the very end is deleted by the next one
        assert self.mortal.file_bytes >= self.engine.capacity().stored_bytes
        for told in self.told.values():
            told.durable = len(told.turns)
        reasons: Reasons = frozenset({None, RebuildReason.RESTARTED})
        self.crowd.meet_again(warm, NOTHING if self.stored == AMPLE else reasons)
        self.happened["restarts"] += 1

    @deed(steps=st.integers(0, 30), warm=st.booleans())
    def crash(self, steps: int, warm: bool) -> None:
        """The engine is killed; what it did in its last steps is not stored."""
        if not self.mortal.lasts:
            return
        self.mortal.cut()
        self.crowd.steps(steps)
        self.mortal.die()
        self.crowd.hear()
        self.happened["turns in flight at a crash"] += len(self.running)
        self.crowd.meet_again(warm, frozenset({None, RebuildReason.RESTARTED}))
        self.happened["crashes"] += 1

    @invariant()
    def sessions_are_as_told(self) -> None:
        for id, told in self.told.items() if self.crowd else ():
            record = session(self.engine, id)
            assert record.transcript.tolist() == told.transcript
            assert len(record.turns) == len(told.turns)
            if record.cache is not None and not any(self.crowd.of(id)):
                assert record.cache.n <= record.policy.bound
                assert len(record.pending) <= 1 or told.reasons != NOTHING

    @invariant()
    def budgets_hold(self) -> None:
        if self.crowd:
            capacity = self.engine.capacity()
            assert capacity.used_bytes <= capacity.peak_bytes <= capacity.budget_bytes
            assert capacity.parked_bytes <= capacity.parked_budget_bytes
            assert capacity.stored_bytes <= capacity.stored_budget_bytes
            assert self.mortal.file_bytes <= capacity.stored_budget_bytes
            self.engine._loop.residency.check_integrity()

    @invariant()
    def whoever_parted_goes(self) -> None:
        while self.crowd and self.crowd.parted:
            self.crowd.delete(self.crowd.parted.pop())

    def teardown(self) -> None:
        if self.crowd:
            try:
                self.all_is_given_back()
            finally:
                shutil.rmtree(self.directory)

    def all_is_given_back(self) -> None:
        self.crowd.until(lambda: not self.running)
        for id in list(self.told):
            self.crowd.delete(id)
        capacity = self.engine.capacity()
        assert self.engine._loop.residency.pool.leased_bytes == 0
        assert capacity.parked_bytes == capacity.stored_bytes == 0
        self.crowd.note_moves()
        self.mortal.end(0.0)
        assert not self.mortal.lasts or (self.mortal.file_bytes, self.mortal.rows) == (0, 0)


@pytest.mark.timeout(300)
def test_a_session_s_life(tmp_path_factory: pytest.TempPathFactory) -> None:
    Life.model = tiny.save(tmp_path_factory.mktemp("life"), tiny.config(head_dim=32))
    Life.loaded = load_model(Settings.load(model=str(Life.model), threads=1))
    Life.twin = Twin(Life.model, cache_budget=WORKSPACE + 100 * SLOT, **ANSWERS)
    Life.happened = Counter()
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Life,
        settings=settings(
            max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
    for what in ("restarts", "crashes", "saved", "loaded", RebuildReason.RESTARTED, None):
        assert Life.happened[what], what
