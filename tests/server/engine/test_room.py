"""More sessions than memory has room for, and a store: all turns are answered."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from apiary_server import errors
from apiary_server.engine.engine import Engine
from apiary_server.sessions.info import RebuildReason, State
from tests.server.driver import (
    Reader,
    ask,
    begin,
    create,
    request,
    run,
    same,
    session,
    state,
    step,
    until,
)
from tests.server.engine.lasting import SLOT, WORKSPACE, archive, close, hang_reads, refuse_writes, saved

MakeEngine = Callable[..., Engine]
Make = Callable[..., Engine]
PROMPT = list(range(3, 153))
LARGE = "buzz(sink=2,window=8,threshold=38,stride=5)"  # of which a pool for four default sessions holds two


@pytest.mark.parametrize("parked", [0, 2 * SLOT])
def test_more_sessions_than_memory_all_answer(make: Make, make_engine: MakeEngine, parked: int) -> None:
    """A pool for three, and twelve sessions that take turns: the others' caches are in the store alone."""
    calm = make_engine(start=False)
    engine = make(cache_budget=WORKSPACE + 4 * SLOT, parked_budget=parked)
    ids = [f"s{number}" for number in range(12)]
    for each in (calm, engine):
        for id in ids:
            create(each, id)
    for number in range(3):
        for place, id in enumerate(ids):
            again, through = (
                ask(each, PROMPT[place : 30 + 3 * place], id, max_tokens=9) for each in (engine, calm)
            )
            assert again.token_ids == through.token_ids
            assert again.usage.rebuild_reason is None, (number, id)
            assert engine.capacity().parked_bytes <= parked
    assert engine._loop.residency.moves["stored"] > 20
    assert engine._loop.residency.moves["loaded"] > 20
    states = {engine.sessions.get("default", id).state for id in ids}
    assert states >= {State.STORED, State.RESIDENT}
    close(engine)


def test_turns_that_come_together_wait_for_room(make: Make, make_engine: MakeEngine) -> None:
    calm = make_engine(start=False)
    engine = make(cache_budget=WORKSPACE + 4 * SLOT, parked_budget=0)
    ids = [f"s{number}" for number in range(10)]
    answers = {}
    for each in (calm, engine):
        for id in ids:
            create(each, id)
        for number in range(2):
            readers = [
                begin(each, request(PROMPT[place : 40 + place], id, max_tokens=8))
                for place, id in enumerate(ids)
            ]
            run(each, *readers)
            assert [reader.error for reader in readers] == [None] * 10
            answers[each is calm, number] = [reader.token_ids for reader in readers]
    assert answers[True, 0] == answers[False, 0]
    assert answers[True, 1] == answers[False, 1]
    close(engine)


def test_who_waits_for_turns_in_flight_sends_nobody_to_the_store(make: Make) -> None:
    engine = make(cache_budget=WORKSPACE + 5 * SLOT)
    ids = [f"s{number}" for number in range(10)]
    for id in ids:
        create(engine, id)
        ask(engine, PROMPT, id)
    saved(engine, *ids)
    readers = [begin(engine, request("go on", id, max_tokens=40)) for id in ids[:6]]
    run(engine, *readers)
    assert all(reader.error is None for reader in readers)
    moves = engine.moves()
    assert moves["parked"] > 5, "there was less room than turns"
    assert moves.get("stored", 0) == 0, "what is parked has no slot to give"
    close(engine)


def test_forks_wait_until_others_are_stored(make: Make) -> None:
    """A pool for three, nothing may be parked, and fifteen forks."""
    engine = make(cache_budget=WORKSPACE + 4 * SLOT, parked_budget=0)
    create(engine, "a")
    expected = None
    ask(engine, PROMPT, "a")
    for number in range(15):
        forked = engine.keeper.fork("default", "a", f"f{number}")
        until(engine, forked.done)
        assert forked.result(0).turn_count == 1
    for id in ("a", *(f"f{number}" for number in range(15))):
        answer = ask(engine, "go on", id, max_tokens=30)
        expected = expected or answer.token_ids
        assert (answer.token_ids, answer.usage.rebuild_reason) == (expected, None)
    close(engine)


def test_nobody_is_refused_for_those_who_are_on_their_way(make: Make) -> None:
    """A pool for one, whose turn somebody has who is in no queue yet."""
    engine = make(cache_budget=WORKSPACE + 2 * SLOT, parked_budget=0)
    for id in "ab":
        create(engine, id)
    ask(engine, PROMPT, "a")
    held = engine.sessions.begin_turn("default", "a").result(0)
    reader = begin(engine, request(PROMPT[:40], "b", max_tokens=8))
    step(engine, 20)
    assert not reader.ended
    engine.sessions.end_turn(held)
    run(engine, reader)
    assert reader.error is None
    assert ask(engine, "go on", "a").usage.rebuild_reason is None
    close(engine)


def test_nobody_is_refused_for_those_who_wait_behind_him(make: Make) -> None:
    """A pool for three, who all have a turn in the queue: none of them can be stored until it has run."""
    engine = make(cache_budget=WORKSPACE + 4 * SLOT, parked_budget=0)
    for id in "abc":
        create(engine, id)
        ask(engine, PROMPT, id)
    create(engine, "d")
    readers = [begin(engine, request(PROMPT[:40], id, max_tokens=8)) for id in "dabc"]
    run(engine, *readers)
    assert [reader.error for reader in readers] == [None] * 4
    close(engine)


def test_what_runs_is_waited_for_before_anything_is_lost(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store takes nothing just now; a turn that runs will give its slot back."""
    engine = make(cache_budget=WORKSPACE + 3 * SLOT, parked_budget=0)
    refuse_writes(engine, monkeypatch)
    create(engine, "idle")
    ask(engine, PROMPT, "idle")
    until(engine, lambda: engine.capacity().store_degraded)
    runs, waits = (begin(engine, request(PROMPT, max_tokens=count)) for count in (40, 4))
    run(engine, runs, waits)
    assert (runs.error, waits.error) == (None, None)
    assert not engine.moves().get("lost")
    assert session(engine, "idle").cache is not None
    engine._journal.close(10)  # type: ignore[union-attr]


def test_a_stored_session_s_turn_is_no_longer_for_its_history(make: Make) -> None:
    """What the scheduler reckons with is what will be computed."""
    engine = make(cache_budget=WORKSPACE + 2 * SLOT, parked_budget=0)
    for id in "ab":
        create(engine, id)
        ask(engine, PROMPT, id)
    assert session(engine, "a").cache is None
    begin(engine, request([5, 6, 7], "a"))
    engine._mailbox.obey(0)
    (turn,) = engine._scheduler.turns()
    assert (turn.remaining, turn.cached_tokens) == (4, 165)  # the last of the answer before has no entry yet
    archive(engine).forget(session(engine, "b"))
    engine._loop.residency.free(session(engine, "b"))
    begin(engine, request([5, 6, 7], "b"))
    engine._mailbox.obey(0)
    assert engine._scheduler.turns()[-1].remaining == 169, "there is no cache of it"
    for turn in engine._scheduler.turns():
        turn.stream.close()
    step(engine)
    close(engine)


@pytest.mark.parametrize("which", ["resident", "stored", "parked"])
def test_forks_need_no_second_slot(make: Make, which: str) -> None:
    """A pool for one: the fork has its slot, and the session is left to the store."""
    engine = make(cache_budget=WORKSPACE + 2 * SLOT, parked_budget=SLOT if which == "parked" else 0)
    for id in "ab":
        create(engine, id)
        ask(engine, PROMPT, id)
    name = "b" if which == "resident" else "a"
    if which == "parked":
        saved(engine, "a", "b")
        assert session(engine, "a").parked is not None
        others = [begin(engine, request(PROMPT, "b", max_tokens=200))]
        step(engine, 3)
    else:
        others = []
    forked = engine.keeper.fork("default", name, "c")
    until(engine, forked.done)
    run(engine, *others)
    assert forked.result(0).turn_count == 1
    assert (session(engine, name).cache, session(engine, "c").cache is None) == (None, False)
    assert not session(engine, name).busy
    answers = [ask(engine, "go on", id) for id in ("c", name)]
    assert [answer.usage.rebuild_reason for answer in answers] == [None, None]
    assert answers[0].token_ids == answers[1].token_ids
    close(engine)


def test_forks_that_no_store_takes_are_computed_anew(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(cache_budget=WORKSPACE + 2 * SLOT, parked_budget=0)
    create(engine, "a")
    refuse_writes(engine, monkeypatch)
    ask(engine, PROMPT, "a")
    until(engine, lambda: engine.capacity().store_degraded)
    forked = engine.keeper.fork("default", "a", "c")
    until(engine, forked.done)
    assert forked.result(0).turn_count == 1
    answers = [ask(engine, "go on", id) for id in "ac"]
    assert [answer.usage.rebuild_reason for answer in answers] == [None, RebuildReason.SNAPSHOT_EVICTED]
    assert answers[0].token_ids == answers[1].token_ids
    engine._journal.close(10)  # type: ignore[union-attr]


def test_a_stored_session_waits_for_its_slot_however_long(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apiary_server.engine.restorer._PATIENCE", 0.01)
    monkeypatch.setattr("apiary_server.worker._PATIENCE", 0.01)
    engine = make(cache_budget=WORKSPACE + 2 * SLOT, parked_budget=0)
    for id in "ab":
        create(engine, id)
        ask(engine, PROMPT, id)
    assert session(engine, "a").cache is None
    long, stored = (
        begin(engine, request(PROMPT, id, max_tokens=count)) for id, count in (("b", 300), ("a", 8))
    )
    run(engine, long, stored)
    assert stored.deltas[0].index == 0
    assert stored.usage.queue_time > 0.05
    assert (stored.usage.rebuild_reason, stored.usage.cached_tokens) == (None, 165)
    close(engine)


def entangle(engine: Engine, *, max_tokens: int = 8) -> tuple[Reader, Reader]:
    """One turn runs and needs a second slot to go on; the other waits, and its session has that slot."""
    create(engine, "large", LARGE)
    create(engine, "small")
    for id in ("large", "small"):
        ask(engine, PROMPT, id)
    large, small = (
        begin(engine, request(PROMPT[:40], id, max_tokens=max_tokens)) for id in ("large", "small")
    )
    assert session(engine, "small").lease is not None
    return large, small


def test_who_has_not_started_makes_room_for_those_who_have(make: Make, make_engine: MakeEngine) -> None:
    calm = make_engine(start=False)
    engine = make(cache_budget=WORKSPACE + 4 * SLOT, parked_budget=0, max_running=1)
    expected, readers = entangle(calm), entangle(engine)
    run(calm, *expected)
    run(engine, *readers)
    assert engine.moves()["stored"] == engine.moves()["loaded"] == 1
    for reader, other in zip(readers, expected, strict=True):
        assert reader.token_ids == other.token_ids
        assert (reader.usage.rebuild_reason, reader.usage.durable) == (None, True)
        assert reader.usage.cached_tokens == other.usage.cached_tokens
    close(engine)


def test_without_a_store_one_of_them_is_refused(make_engine: MakeEngine) -> None:
    engine = make_engine(start=False, cache_budget=WORKSPACE + 4 * SLOT, parked_budget=0, max_running=1)
    large, small = entangle(engine)
    before = state(session(engine, "large"))
    run(engine, large, small)
    assert isinstance(large.error, errors.BudgetExhausted)
    assert small.error is None
    assert same(before | {"busy": False}, state(session(engine, "large")))


def test_who_leaves_while_its_cache_is_away_leaves_nothing(make: Make) -> None:
    engine = make(cache_budget=WORKSPACE + 4 * SLOT, parked_budget=0, max_running=1)
    large, small = entangle(engine)
    until(engine, lambda: session(engine, "small").cache is None)
    small.close()
    step(engine)
    assert isinstance(small.error, errors.Cancelled)
    assert not session(engine, "small").busy
    run(engine, large)
    again = ask(engine, "go on", "small")
    assert again.usage.rebuild_reason is None
    close(engine)


def test_who_leaves_while_its_cache_comes_back_leaves_nothing(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(cache_budget=WORKSPACE + 4 * SLOT, parked_budget=0, max_running=1)
    large, small = entangle(engine)
    go_on, hangs = hang_reads(engine, monkeypatch)
    run(engine, large)
    until(engine, hangs.is_set)
    assert session(engine, "small").lease is not None, "it is read for a slot that it has"
    small.close()
    step(engine)
    assert isinstance(small.error, errors.Cancelled)
    assert (session(engine, "small").busy, session(engine, "small").lease) == (False, None)
    rewound = engine.keeper.rewind("default", "small", 0)
    until(engine, rewound.done)
    assert rewound.result(0).turn_count == 0
    go_on.set()
    assert ask(engine, "go on", "small").usage.cached_tokens == 0
    close(engine)


def test_a_cache_that_does_not_come_back_is_computed_anew(
    make: Make, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = make_engine(start=False)
    engine = make(cache_budget=WORKSPACE + 4 * SLOT, parked_budget=0, max_running=1)
    expected, readers = entangle(calm), entangle(engine)
    run(calm, *expected)
    monkeypatch.setattr(archive(engine).shelf._store, "read", lambda *_: None)
    run(engine, *readers)
    assert [reader.token_ids for reader in readers] == [reader.token_ids for reader in expected]
    usages = [reader.usage for reader in readers]
    assert [usage.rebuild_reason for usage in usages] == [None, RebuildReason.SNAPSHOT_CORRUPT]
    assert usages[1].cached_tokens == 0
    assert [usage.prompt_tokens for usage in usages] == [40, 40]
    close(engine)


def test_nobody_waits_for_ever_while_others_ask_again_at_once(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool for three, whose next turns wait already when theirs end, and a fourth."""
    monkeypatch.setattr("apiary_server.worker._PATIENCE", 0.2)
    engine = make(cache_budget=WORKSPACE + 4 * SLOT, parked_budget=0)
    for id in "abc":
        create(engine, id)
        ask(engine, PROMPT, id)
    create(engine, "d")
    readers = [
        begin(engine, request(PROMPT[:40], id, max_tokens=8, wait=True)) for _ in range(80) for id in "abc"
    ]
    late = begin(engine, request(PROMPT[:40], "d", max_tokens=8))
    run(engine, late)
    assert late.error is None
    assert not all(reader.ended for reader in readers)
    run(engine, *readers, steps=50_000)
    assert all(reader.error is None for reader in readers)
    close(engine)


def test_what_no_store_takes_makes_room_all_the_same(
    make: Make, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk and the memory are full: caches are lost and computed anew, rather than turns refused."""
    calm = make_engine(start=False)
    engine = make(cache_budget=WORKSPACE + 4 * SLOT, parked_budget=2 * SLOT)
    refuse_writes(engine, monkeypatch)
    ids = [f"s{number}" for number in range(8)]
    reasons = set()
    for each in (calm, engine):
        for id in ids:
            create(each, id)
    for _ in range(3):
        for place, id in enumerate(ids):
            answer, expected = (ask(each, PROMPT[place : 40 + place], id) for each in (engine, calm))
            assert answer.error is None
            assert answer.token_ids == expected.token_ids
            reasons.add(answer.usage.rebuild_reason)
    assert reasons == {None, RebuildReason.SNAPSHOT_EVICTED}
    assert engine.moves()["lost"] > 8
    assert engine.capacity().store_degraded
    engine._journal.close(10)  # type: ignore[union-attr]
