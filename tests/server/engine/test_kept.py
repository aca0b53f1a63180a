"""Turns that are cut short and leave what was read: the session is as if that had been all of the answer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from apiary_server import errors
from apiary_server.engine.engine import Engine
from apiary_server.engine.request import Stopping
from tests.server.driver import alike, ask, begin, create, request, run, same, session, state, step

MakeEngine = Callable[..., Engine]
PROMPT = list(range(3, 153))
POLICIES = ["buzz(sink=2,window=8,threshold=20)", "full(bound=600)", "h2o(heavy=10,recent=10,block=4)"]


def cache_after(make_engine: MakeEngine, policy: str, tokens: int) -> dict[str, object]:
    """The cache when so many tokens of the answer are in it."""
    engine = make_engine(start=False)
    create(engine, "a", policy)
    ask(engine, PROMPT, "a", max_tokens=25)
    ask(engine, PROMPT, "a", max_tokens=tokens + 1)  # the last one is not fed back
    return cache_of(engine)


def cache_of(engine: Engine) -> dict[str, object]:
    return state(session(engine, "a")) | {"turns": None, "update_time": None, "transcript": None}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("taken", "unread"), [(2, 0), (30, 0), (30, 1), (30, 17)])
def test_what_was_read_stays(make_engine: MakeEngine, policy: str, taken: int, unread: int) -> None:
    engine = make_engine(start=False)
    create(engine, "a", policy)
    ask(engine, PROMPT, "a", max_tokens=25)
    reader = begin(engine, request(PROMPT, "a", max_tokens=300, keep=True), reads=False)
    while len(reader.token_ids) < taken + unread:
        step(engine)
    reader.read(taken)
    reader.close()
    run(engine, reader)
    assert isinstance(reader.error, errors.Cancelled)
    assert "kept" in reader.error.message
    assert session(engine, "a").transcript[-taken:].tolist() == reader.token_ids[:taken]
    record = session(engine, "a").turns[-1]
    assert (record.finish, record.completion_tokens) == ("cancelled", taken)
    assert alike(cache_of(engine), cache_after(make_engine, policy, taken))
    assert len(ask(engine, "go on", "a").token_ids) == 16


def test_a_deadline_keeps_what_was_read(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(start=False)
    create(engine, "a")
    reader = begin(engine, request(PROMPT, "a", max_tokens=300, keep=True, deadline=1e12))
    while len(reader.token_ids) < 5:
        step(engine)
    turn = engine._loop._scheduler.running[0]
    turn.request = turn.request.model_copy(update={"deadline": 0.0})
    run(engine, reader)
    assert isinstance(reader.error, errors.DeadlineExceeded)
    assert session(engine, "a").turns[-1].completion_tokens == 5


@pytest.mark.parametrize(("taken", "unread"), [(5, 0), (30, 17)])
def test_a_worker_that_shuts_down_keeps_what_was_read(
    make_engine: MakeEngine, taken: int, unread: int
) -> None:
    engine = make_engine(start=False)
    for id in "ab":
        create(engine, id)
    reader = begin(engine, request(PROMPT, "a", max_tokens=300, keep=True), reads=False)
    other = begin(engine, request(PROMPT, "b", max_tokens=300))
    while len(reader.token_ids) < taken + unread:
        step(engine)
    reader.read(taken)
    with torch.inference_mode():
        engine._loop.end_all()
    assert isinstance(reader.error, errors.Draining)
    assert "kept" in reader.error.message
    assert isinstance(other.error, errors.Draining)
    assert "rolled back" in other.error.message
    assert session(engine, "a").transcript[-taken:].tolist() == reader.token_ids[:taken]
    assert session(engine, "a").turns[-1].completion_tokens == taken
    assert not session(engine, "b").turns


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_where_nothing_was_read_nothing_stays(make_engine: MakeEngine, steps: int) -> None:
    engine = make_engine(start=False, step_tokens=16)
    create(engine, "a")
    ask(engine, PROMPT, "a", max_tokens=25)
    before = state(session(engine, "a"))
    reader = begin(engine, request(PROMPT, "a", max_tokens=300, keep=True))
    step(engine, steps)
    reader.close()
    step(engine)
    assert isinstance(reader.error, errors.Cancelled)
    assert same(before, state(session(engine, "a")))


def test_a_deleted_session_keeps_nothing_of_a_turn_that_is_being_kept(make_engine: MakeEngine) -> None:
    engine = make_engine(start=False, step_tokens=16)
    create(engine, "a")
    reader = begin(engine, request(PROMPT, "a", max_tokens=300, keep=True), reads=False)
    while len(reader.token_ids) < 9:
        step(engine)
    reader.read(3)
    reader.close()
    step(engine)  # it computes the kept answer again
    assert reader.error is None
    engine.keeper.delete("default", "a")
    step(engine)
    assert isinstance(reader.error, errors.Cancelled)
    assert engine._loop.residency.pool.leased_bytes == 0


def test_a_stop_string_s_replay_may_be_cut_short_too(make_engine: MakeEngine) -> None:
    engine = make_engine(start=False, step_tokens=16)
    create(engine, "a")
    whole = ask(engine, PROMPT, "a", max_tokens=40).text
    create(engine, "b")
    stop = Stopping(max_tokens=300, stop=(whole[20:23],), ignore_eos=True)
    turn = request(PROMPT, "b", keep=True).model_copy(update={"stopping": stop})
    reader = begin(engine, turn, reads=False)
    while not (turns := engine._loop._scheduler.running) or not turns[0].replaying:
        step(engine)
    reader.read(2)
    reader.close()
    run(engine, reader)
    assert session(engine, "b").transcript.tolist() == [*PROMPT, *reader.token_ids[:2]]
