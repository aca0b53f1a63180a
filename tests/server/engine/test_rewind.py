"""Turns that are taken back."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from apiary_server import errors
from apiary_server.engine.engine import Engine
from apiary_server.sessions.info import RebuildReason, SessionInfo, State
from tests.server.driver import ask, begin, create, outcome, request, run, session, step

MakeEngine = Callable[..., Engine]
PROMPT = list(range(3, 153))


def rewind(engine: Engine, id: str, turns: int) -> SessionInfo:
    return outcome(engine, engine.keeper.rewind("default", id, turns))


@pytest.mark.parametrize("policy", ["buzz(sink=2,window=8,threshold=20)", "full(bound=900)"])
@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_a_session_is_as_it_was_before_those_turns(make_engine: MakeEngine, policy: str, turns: int) -> None:
    engine, calm = make_engine(start=False), make_engine(start=False)
    for each, count in ((engine, 4), (calm, turns)):
        create(each, "a", policy)
        for number in range(count):
            ask(each, PROMPT[: 20 + 40 * number], "a", max_tokens=5 + 13 * number, request_id=f"r{number}")
    info = rewind(engine, "a", turns)
    transcript = session(calm, "a").transcript.tolist()
    assert (info.turn_count, info.token_count, info.state) == (
        turns,
        len(transcript),
        State.STORED if turns else State.EMPTY,
    )
    assert session(engine, "a").transcript.tolist() == transcript
    assert engine._loop.residency.pool.leased_bytes == 0
    one, other = (ask(each, "go on", "a", max_tokens=40) for each in (engine, calm))
    assert one.token_ids == other.token_ids
    assert one.usage.rebuild_reason is (RebuildReason.REWOUND if turns else None)
    assert ask(engine, "and on", "a").usage.rebuild_reason is None


def test_a_request_that_was_taken_back_is_answered_anew(make_engine: MakeEngine) -> None:
    engine = make_engine(start=False)
    create(engine, "a")
    first = ask(engine, PROMPT, "a", max_tokens=9, request_id="x")
    rewind(engine, "a", 0)
    reader = begin(engine, request(PROMPT, "a", max_tokens=9, request_id="x"))
    assert not reader.ended
    run(engine, reader)
    assert reader.token_ids == first.token_ids
    assert len(session(engine, "a").turns) == 1


def test_what_cannot_be_rewound(make_engine: MakeEngine) -> None:
    engine = make_engine(start=False)
    create(engine, "a")
    ask(engine, PROMPT, "a")
    with pytest.raises(errors.SessionNotFound):
        engine.keeper.rewind("other", "a", 0)
    with pytest.raises(errors.InvalidField):
        rewind(engine, "a", 2)
    assert rewind(engine, "a", 1).state is State.RESIDENT, "nothing was taken back"
    reader = begin(engine, request("hello", "a"))
    with pytest.raises(errors.SessionBusy):
        engine.keeper.rewind("default", "a", 1)
    run(engine, reader)
    assert len(session(engine, "a").turns) == 2
    engine.keeper.delete("default", "a")
    step(engine)
    assert engine._loop.residency.pool.leased_bytes == 0
