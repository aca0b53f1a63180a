"""A session's life at random: create, turn, cancel at any moment, fork, change the policy, delete, expire.

The budget always holds, a turn leaves nothing or just what was read, and when all sessions are gone so is
their memory.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from apiary_server import errors
from apiary_server.engine.engine import Engine
from apiary_server.sessions.pool import Geometry, SlotLayout
from apiary_server.sessions.request import SessionChange
from apiary_server.settings import Settings
from apiary_server.worker import build
from buzz import parse
from tests import tiny
from tests.server.driver import Reader, create, request, same, session, state

POLICIES = [
    None,
    "buzz(sink=0,window=0,threshold=9,stride=3)",
    "buzz(sink=2,window=8,threshold=30,positions=original)",
    "full(bound=90)",
    "streaming(sink=2,window=20,block=4)",
    "h2o(heavy=8,recent=8,block=3)",
    "h2o(heavy=24,recent=40,block=8,kivi=4,residual=4)",
    "buzz(sink=2,window=8,threshold=60,kivi=2,residual=0,positions=original)",
    "full(bound=90,kivi=4,residual=8)",
]
DEFAULT = "buzz(sink=2,window=8,threshold=20,stride=5)"
GEOMETRY = Geometry(layers=2, kv_heads=2, head_dim=32, dtype=torch.float32)
WORKSPACE = SlotLayout.of_workspace(GEOMETRY, 256).bytes
SLOT = SlotLayout.of(GEOMETRY, parse(DEFAULT), slack=16).bytes


class Life(RuleBasedStateMachine):
    """Against a simple model: what each session's transcript must be."""

    model: Path

    def __init__(self) -> None:
        super().__init__()
        self.transcripts: dict[str, list[int]] = {}
        self.running: list[tuple[str, list[int], Reader, dict[str, object], bool]] = []
        self.number = 0

    @initialize(slots=st.integers(4, 9), step_tokens=st.sampled_from([7, 64, 256]), running=st.integers(1, 6))
    def start(self, slots: int, step_tokens: int, running: int) -> None:
        self.engine: Engine = build(
            Settings.load(
                model=str(self.model),
                policy=DEFAULT,
                cache_budget=WORKSPACE + slots * SLOT,
                parked_budget=4 * SLOT,
                workspace_entries=256,
                slack=16,
                step_tokens=step_tokens,
                max_running=running,
                threads=1,
            )
        )

    @rule(policy=st.sampled_from(POLICIES))
    @precondition(lambda self: len(self.transcripts) < 12)
    def create_session(self, policy: str | None) -> None:
        self.number += 1
        try:
            self.transcripts[create(self.engine, f"s{self.number}", policy)] = []
        except errors.InvalidField:
            assert policy in POLICIES[3:4] + POLICIES[6:], "those whose slots may be too large"

    @rule(
        data=st.data(),
        length=st.sampled_from([1, 5, 40, 120, 700]),
        tokens=st.integers(1, 40),
        keep=st.booleans(),
    )
    @precondition(lambda self: self.transcripts)
    def turn(self, data: st.DataObject, length: int, tokens: int, keep: bool) -> None:
        id = data.draw(st.sampled_from(sorted(self.transcripts)))
        prompt = [3 + (i * 7) % 250 for i in range(length)]
        before, busy = state(session(self.engine, id)), session(self.engine, id).busy
        reader = Reader()
        try:
            self.engine.open(request(prompt, id, max_tokens=tokens, keep=keep), reader)
        except errors.SessionBusy:
            assert busy
            return
        except errors.ContextFull:
            assert session(self.engine, id).policy.name == "full"
            assert same(before, state(session(self.engine, id)))
            return
        assert not busy
        self.running.append((id, prompt, reader, before, keep))

    @rule(count=st.integers(1, 30))
    @precondition(lambda self: self.running)
    def steps(self, count: int) -> None:
        for _ in range(count):
            if not self.running:
                return
            self.step()

    @rule(data=st.data())
    @precondition(lambda self: self.running)
    def cancel(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.running))[2].close()
        self.step()

    @rule(data=st.data())
    @precondition(lambda self: 0 < len(self.transcripts) < 12)
    def fork(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.transcripts)))
        self.number += 1
        new = f"s{self.number}"
        if session(self.engine, id).busy:
            with pytest.raises(errors.SessionBusy):
                self.engine.keeper.fork("default", id, new)
            return
        before = state(session(self.engine, id)) | {"update_time": None}
        forked = self.engine.keeper.fork("default", id, new)
        self.step()
        if isinstance(forked.exception(0), errors.BudgetExhausted):
            with pytest.raises(errors.SessionNotFound):
                self.engine.sessions.get("default", new)
            return
        assert forked.result(0).token_count == len(self.transcripts[id])
        self.transcripts[new] = list(self.transcripts[id])
        if session(self.engine, id).parked is None:
            after = state(session(self.engine, new)) | {"update_time": None}
            assert "keys" not in before or same(before, after)

    @rule(data=st.data(), policy=st.sampled_from(POLICIES[1:]))
    @precondition(lambda self: self.transcripts)
    def change_policy(self, data: st.DataObject, policy: str) -> None:
        id = data.draw(st.sampled_from(sorted(self.transcripts)))
        before = str(session(self.engine, id).policy)
        try:
            changed = self.engine.keeper.update("default", id, SessionChange(policy=policy))
        except errors.SessionBusy:
            assert session(self.engine, id).busy
            return
        self.step()
        if isinstance(changed.exception(0), errors.InvalidField | errors.ContextFull):
            assert str(session(self.engine, id).policy) == before
            assert not session(self.engine, id).busy
        else:
            assert changed.result(0).policy == str(session(self.engine, id).policy)

    @rule(data=st.data())
    @precondition(lambda self: self.transcripts)
    def rewind(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.transcripts)))
        turns = [turn.prompt_tokens + turn.completion_tokens for turn in session(self.engine, id).turns]
        count = data.draw(st.integers(0, len(turns)))
        if session(self.engine, id).busy:
            with pytest.raises(errors.SessionBusy):
                self.engine.keeper.rewind("default", id, count)
            return
        rewound = self.engine.keeper.rewind("default", id, count)
        self.step()
        assert rewound.result(0).turn_count == count
        del self.transcripts[id][sum(turns[:count]) :]

    @rule(data=st.data())
    @precondition(lambda self: self.transcripts)
    def delete(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.transcripts)))
        del self.transcripts[id]
        self.engine.keeper.delete("default", id)
        self.step()

    @rule(data=st.data())
    @precondition(lambda self: self.transcripts)
    def expire(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.transcripts)))
        record = session(self.engine, id)
        if not record.busy:
            record.expire_time = self.engine.sessions._next_expiry = 0.0
            del self.transcripts[id]
            self.engine._loop.post(lambda: None)  # an idle engine looks after half a second otherwise
            self.step()
            with pytest.raises(errors.SessionNotFound):
                self.engine.sessions.get("default", id)

    def step(self) -> None:
        with torch.inference_mode():
            self.engine._loop.step()
        still = []
        for id, prompt, reader, before, keep in self.running:
            kept = keep and isinstance(reader.error, errors.Cancelled) and reader.token_ids
            if not reader.ended:
                still.append((id, prompt, reader, before, keep))
            elif id in self.transcripts and (reader.error is None or kept):
                self.transcripts[id] += prompt + reader.token_ids
            elif id in self.transcripts:
                assert isinstance(reader.error, errors.Cancelled | errors.BudgetExhausted), reader.error
                record = session(self.engine, id)
                after = state(record)
                if record.parked is None and "keys" in before:
                    assert same(before, after), "a turn that did not commit left a trace"
        self.running = still

    @invariant()
    def the_budget_holds(self) -> None:
        if not hasattr(self, "engine"):
            return
        capacity = self.engine.capacity()
        assert capacity.used_bytes <= capacity.peak_bytes <= capacity.budget_bytes
        assert capacity.parked_bytes <= capacity.parked_budget_bytes
        self.engine._loop.residency.check_integrity()

    @invariant()
    def transcripts_agree_and_bounds_hold(self) -> None:
        busy = {id for id, *_ in self.running}
        for id, transcript in self.transcripts.items():
            record = session(self.engine, id)
            assert record.transcript.tolist() == transcript
            if record.cache is not None and id not in busy:
                assert record.cache.n <= record.policy.bound
                assert len(record.pending) <= 1

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(5000):
            if not self.running:
                break
            self.step()
        assert not self.running
        for id in list(self.transcripts):
            self.engine.keeper.delete("default", id)
        self.engine._loop.post(lambda: None)
        with torch.inference_mode():
            self.engine._loop.step()
        assert self.engine._loop.residency.pool.leased_bytes == 0
        assert self.engine.capacity().parked_bytes == 0


@pytest.mark.timeout(300)
def test_a_session_s_life(tmp_path_factory: pytest.TempPathFactory) -> None:
    Life.model = tiny.save(tmp_path_factory.mktemp("life"), tiny.config(head_dim=32))
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Life,
        settings=settings(
            max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
