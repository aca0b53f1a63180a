"""Changes of a session's settings; another policy has the cache computed anew."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from apiary_server import errors
from apiary_server.engine.engine import Engine
from apiary_server.sessions.info import RebuildReason, SessionInfo, State
from apiary_server.sessions.request import SessionChange
from tests.server.driver import ask, begin, create, outcome, request, run, session, state, step

MakeEngine = Callable[..., Engine]
PROMPT = list(range(3, 153))
BUZZ = "buzz(sink=2,window=8,threshold=20)"


def update(engine: Engine, id: str, **changes: object) -> SessionInfo:
    change = SessionChange(**changes)  # type: ignore[arg-type]
    return outcome(engine, engine.keeper.update("default", id, change))


@pytest.fixture
def engine(make_engine: MakeEngine) -> Engine:
    engine = make_engine(start=False)
    create(engine, "a", BUZZ)
    ask(engine, PROMPT, "a", max_tokens=25)
    return engine


def test_settings_change_and_the_cache_stays(engine: Engine) -> None:
    before = state(session(engine, "a"))
    info = update(engine, "a", labels={"team": "bees"})
    assert dict(info.labels) == {"team": "bees"}
    now = time.time()
    assert now + 49 < update(engine, "a", ttl=50.0).expire_time < now + 51
    assert session(engine, "a").ttl == 50.0
    assert update(engine, "a", expire_time=now + 99).expire_time == now + 99
    assert session(engine, "a").ttl is None
    assert update(engine, "a", policy=str(session(engine, "a").policy)).state is State.RESIDENT
    assert state(session(engine, "a")).keys() == before.keys()
    assert ask(engine, "go on", "a").usage.rebuild_reason is None


def test_settings_change_while_a_turn_runs_but_not_the_policy(engine: Engine) -> None:
    reader = begin(engine, request("hello", "a", max_tokens=30))
    step(engine, 2)
    assert dict(update(engine, "a", labels={"b": "c"}).labels) == {"b": "c"}
    with pytest.raises(errors.SessionBusy):
        update(engine, "a", policy="full", labels={"d": "e"})
    run(engine, reader)
    assert dict(session(engine, "a").labels) == {"b": "c"}


@pytest.mark.parametrize("policy", ["full(bound=600)", "h2o(heavy=10,recent=10,block=4)"])
def test_another_policy_computes_the_cache_anew(make_engine: MakeEngine, engine: Engine, policy: str) -> None:
    ask(engine, "more", "a", max_tokens=9)
    transcript = session(engine, "a").transcript.tolist()
    info = update(engine, "a", policy=policy)
    assert (info.state, info.turn_count, info.token_count) == (State.STORED, 2, len(transcript))
    assert engine._loop.residency.pool.leased_bytes == 0
    answer = ask(engine, [40, 41], "a")
    assert answer.usage.rebuild_reason is RebuildReason.POLICY_CHANGED
    assert answer.usage.cached_tokens == 0
    assert answer.usage.prompt_tokens == 2
    assert ask(engine, "and on", "a").usage.rebuild_reason is None
    if policy.startswith("full"):  # the same as ever having had it, where nothing was evicted
        calm = make_engine(start=False)
        create(calm, "a", policy)
        assert ask(calm, [*transcript, 40, 41], "a").token_ids == answer.token_ids


def test_a_rebuild_comes_by_the_same_boundaries(make_engine: MakeEngine) -> None:
    engine, calm = make_engine(start=False), make_engine(start=False)
    for each in (engine, calm):
        create(each, "a", BUZZ)
        for number in range(4):
            ask(each, PROMPT[: 20 + 40 * number], "a", max_tokens=5 + 13 * number)
    engine._loop.residency.free(session(engine, "a"))
    one, other = (ask(each, "go on", "a", max_tokens=40) for each in (engine, calm))
    assert one.token_ids == other.token_ids
    states = [state(session(each, "a")) for each in (engine, calm)]
    assert torch.equal(states[0]["position"], states[1]["position"])  # type: ignore[arg-type]
    assert torch.allclose(states[0]["keys"], states[1]["keys"], atol=1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_a_cancelled_rebuild_is_tried_again(engine: Engine, steps: int) -> None:
    update(engine, "a", policy="full(bound=600)")
    reader = begin(engine, request("go on", "a", max_tokens=300))
    step(engine, steps)
    reader.close()
    step(engine)
    assert session(engine, "a").cache is None
    assert engine._loop.residency.pool.leased_bytes == 0
    assert ask(engine, "go on", "a").usage.rebuild_reason is RebuildReason.POLICY_CHANGED


def test_policies_that_cannot_be_had(engine: Engine) -> None:
    before = str(session(engine, "a").policy)
    for bad in ("nonsense", "buzz(window=999999)"):
        with pytest.raises(errors.InvalidField):
            update(engine, "a", policy=bad)
    with pytest.raises(errors.ContextFull) as caught:
        update(engine, "a", policy="full(bound=100)")
    assert caught.value.metadata["bound"] == "100"
    assert str(session(engine, "a").policy) == before
    assert not session(engine, "a").busy
    assert ask(engine, "go on", "a").usage.rebuild_reason is None


def test_an_empty_session_has_nothing_to_rebuild(engine: Engine) -> None:
    create(engine, "b")
    assert update(engine, "b", policy="full(bound=600)").state is State.EMPTY
    assert ask(engine, "hello", "b").usage.rebuild_reason is None
