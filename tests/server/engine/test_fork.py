"""Forks: what was committed, in a session of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from apiary_server import errors
from apiary_server.engine.engine import Engine
from apiary_server.sessions.info import SessionInfo, State
from tests.server.driver import Reader, ask, begin, create, outcome, request, run, same, session, state, step

MakeEngine = Callable[..., Engine]
PROMPT = list(range(3, 153))


def fork(engine: Engine, id: str, new: str) -> SessionInfo:
    return outcome(engine, engine.keeper.fork("default", id, new))


def content(engine: Engine, id: str) -> dict[str, object]:
    return state(session(engine, id)) | {"update_time": None}


@pytest.mark.parametrize(
    "policy",
    [
        "buzz(sink=2,window=8,threshold=20)",
        "full(bound=600)",
        "h2o(heavy=10,recent=10,block=4)",
    ],
)
def test_a_fork_goes_its_own_way(make_engine: MakeEngine, policy: str) -> None:
    calm, engine = make_engine(start=False), make_engine(start=False)
    for each in (calm, engine):
        create(each, "a", policy)
        ask(each, PROMPT, "a", max_tokens=25)
    before = content(engine, "a")
    info = fork(engine, "a", "b")
    assert (info.id, info.turn_count, info.token_count, info.state) == ("b", 1, 175, State.RESIDENT)
    assert same(before, content(engine, "b"))
    ask(engine, "another way", "b", max_tokens=60)
    assert same(before, content(engine, "a")), "the fork's turns are its own"
    assert ask(engine, "go on", "a").token_ids == ask(calm, "go on", "a").token_ids
    assert fork(engine, "b", "c").turn_count == 2
    for id in "abc":
        engine.keeper.delete("default", id)
    step(engine)
    assert engine._loop.residency.pool.leased_bytes == 0


def test_a_fork_of_an_empty_session(make_engine: MakeEngine) -> None:
    engine = make_engine(start=False)
    create(engine, "a", labels={"of": "bees"})
    info = fork(engine, "a", "b")
    assert (info.state, info.turn_count, dict(info.labels)) == (State.EMPTY, 0, {"of": "bees"})
    assert len(ask(engine, "hello", "b").token_ids) == 16
    assert session(engine, "a").turns == []


def test_forks_beyond_the_budget_are_parked_and_all_answer(make_engine: MakeEngine) -> None:
    engine = make_engine(start=False, cache_budget=86_144 + 21 * 14_080)
    create(engine, "a", None)
    ask(engine, PROMPT, "a", max_tokens=25)
    expected = None
    for number in range(100):
        fork(engine, "a" if number % 3 else f"f{number - 1}" if number else "a", f"f{number}")
    assert (engine.capacity().resident_sessions, engine.capacity().parked_sessions) == (20, 81)
    for number in range(100):
        answer = ask(engine, "go on", f"f{number}").token_ids
        expected = expected or answer
        assert answer == expected
    assert ask(engine, "go on", "a").token_ids == expected


def test_where_there_is_no_room_there_is_no_fork(make_engine: MakeEngine) -> None:
    engine = make_engine(start=False, cache_budget=86_144 + 4 * 14_080, parked_budget=0)
    create(engine, "a")
    ask(engine, PROMPT, "a", max_tokens=25)
    made = engine._loop.residency.pool.places(session(engine, "a").layout) - 2  # itself, and the reserve
    for number in range(made):
        fork(engine, "a", f"f{number}")
    with pytest.raises(errors.BudgetExhausted):
        fork(engine, "a", "one too many")
    assert len(engine.sessions) == made + 1
    assert not session(engine, "a").busy
    assert len(ask(engine, "go on", "a").token_ids) == 16
    engine._loop.residency.check_integrity()


def test_only_idle_sessions_are_forked_and_no_other_s(make_engine: MakeEngine) -> None:
    engine = make_engine(start=False)
    create(engine, "a")
    create(engine, "b")
    with pytest.raises(errors.SessionNotFound):
        engine.keeper.fork("default", "unknown", None)
    with pytest.raises(errors.SessionNotFound):
        engine.keeper.fork("other", "a", None)
    with pytest.raises(errors.SessionExists):
        fork(engine, "a", "b")
    assert not session(engine, "a").busy
    reader = begin(engine, request("hello", "a"))
    with pytest.raises(errors.SessionBusy):
        engine.keeper.fork("default", "a", "c")
    run(engine, reader)
    assert fork(engine, "a", "c").turn_count == 1


def test_a_session_that_goes_before_it_is_forked(make_engine: MakeEngine) -> None:
    engine = make_engine(start=False)
    create(engine, "a")
    ask(engine, PROMPT, "a")
    forked = engine.keeper.fork("default", "a", "b")
    engine.keeper.delete("default", "a")
    step(engine)
    with pytest.raises(errors.SessionNotFound):
        forked.result(0)
    with pytest.raises(errors.SessionNotFound):
        engine.sessions.get("default", "b")
    engine._loop.residency.check_integrity()
    assert engine._loop.residency.pool.leased_bytes == 0


def test_a_turn_may_wait_for_a_fork(make_engine: MakeEngine) -> None:
    engine = make_engine(start=False)
    create(engine, "a")
    ask(engine, PROMPT, "a")
    forked = engine.keeper.fork("default", "a", "b")
    reader = Reader()
    queued = engine.open(request("go on", "a", wait=True), reader)
    step(engine)
    assert forked.result(0).turn_count == 1
    queued.result(10)
    run(engine, reader)
    assert len(session(engine, "b").turns) == 1


def test_a_fork_after_the_engine_thread_has_ended(make_engine: MakeEngine) -> None:
    """Whoever asks does it in his own thread then: here another session is parked for it."""
    engine = make_engine(start=False, cache_budget=86_144 + 4 * 14_080)  # of which one slot is the reserve
    for id in "abcd":
        create(engine, id)
    for id in "abcda":  # the last one comes back, and leaves a buffer of host memory
        ask(engine, PROMPT, id)
    parked = engine.moves()["parked"]
    assert engine.moves()["unparked"]
    engine._mailbox.close()
    assert engine.keeper.fork("default", "a", "b2").result(0).state is State.RESIDENT
    assert engine.moves()["parked"] > parked
