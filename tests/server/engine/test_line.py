"""Turns that wait for their session: in order, and gone with it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from apiary_server import errors
from apiary_server.engine.engine import Engine
from tests.server.driver import Reader, begin, create, request, run, session, step

MakeEngine = Callable[..., Engine]


@pytest.fixture
def engine(make_engine: MakeEngine) -> Engine:
    engine = make_engine(start=False)
    create(engine, "a")
    return engine


def test_turns_that_wait_come_in_order(engine: Engine) -> None:
    first = begin(engine, request("one", "a", max_tokens=5))
    readers = [Reader() for _ in range(4)]
    waiting = [
        engine.open(request(f"turn {number}", "a", max_tokens=number + 1, wait=True), reader)
        for number, reader in enumerate(readers)
    ]
    with pytest.raises(errors.SessionBusy):
        engine.open(request("now", "a"), Reader())
    run(engine, first)
    for queued, reader in zip(waiting, readers, strict=True):
        queued.result(10)
        run(engine, reader)
    assert [record.completion_tokens for record in session(engine, "a").turns] == [5, 1, 2, 3, 4]
    assert not session(engine, "a").busy
    assert not engine._admission


def test_who_leaves_the_line_is_passed_over(engine: Engine) -> None:
    first = begin(engine, request("one", "a", max_tokens=5))
    gone, stays = Reader(), Reader()
    left, queued = (engine.open(request("next", "a", max_tokens=2, wait=True), one) for one in (gone, stays))
    gone.close()
    with pytest.raises(errors.Cancelled):
        left.result(10)
    run(engine, first)
    queued.result(10)
    run(engine, stays)
    assert [record.completion_tokens for record in session(engine, "a").turns] == [5, 2]
    assert not engine._admission


def test_a_refused_turn_lets_the_next_go(engine: Engine) -> None:
    first = begin(engine, request("one", "a", max_tokens=5))
    refused, reader = Reader(), Reader()
    system = [("system", "be rude"), ("user", "x")]  # not in a session that has begun
    no = engine.open(request(system, "a", wait=True), refused)
    yes = engine.open(request("next", "a", max_tokens=2, wait=True), reader)
    run(engine, first)
    with pytest.raises(errors.InvalidField):
        no.result(10)
    yes.result(10)
    run(engine, reader)
    assert len(reader.token_ids) == 2
    assert not engine._admission


def test_a_deleted_session_sends_its_line_away(engine: Engine) -> None:
    first = begin(engine, request("one", "a", max_tokens=500))
    step(engine, 2)
    queued = engine.open(request("next", "a", wait=True), Reader())
    engine.keeper.delete("default", "a")
    with pytest.raises(errors.SessionNotFound):
        queued.result(10)
    step(engine)
    assert isinstance(first.error, errors.Cancelled)
    assert not engine._admission


def test_a_session_that_expires_meanwhile_sends_its_line_away(engine: Engine) -> None:
    first = begin(engine, request("one", "a", max_tokens=5))
    queued = engine.open(request("next", "a", wait=True), Reader())
    session(engine, "a").ttl, session(engine, "a").expire_time = None, 0.0
    run(engine, first)
    with pytest.raises(errors.SessionNotFound):
        queued.result(10)
    assert not engine._admission


def test_a_worker_that_drains_sends_lines_away(engine: Engine) -> None:
    begin(engine, request("one", "a", max_tokens=500))
    step(engine)
    queued = engine.open(request("next", "a", wait=True), Reader())
    engine.drain()
    with pytest.raises(errors.Draining):
        queued.result(10)
    assert not engine._admission


def test_one_id_for_two_requests_in_line_keeps_the_session_free(engine: Engine) -> None:
    first = begin(engine, request("one", "a", max_tokens=5))
    one, other = Reader(), Reader()
    queued = engine.open(request("this", "a", max_tokens=2, wait=True, request_id="x"), one)
    refused = engine.open(request("that", "a", max_tokens=2, wait=True, request_id="x"), other)
    run(engine, first)
    queued.result(10)
    run(engine, one)
    with pytest.raises(errors.InvalidField, match="another request"):
        refused.result(10)
    assert not session(engine, "a").busy
    assert not engine._admission
