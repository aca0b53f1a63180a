"""What is sent to an engine, and what is noted of it."""

from __future__ import annotations

import pytest

from apiary_bench.errors import LoadError
from apiary_bench.peers import driver
from apiary_bench.peers.workload import Load, tokens
from apiary_bench.serving.record import Outcome, Record

from .fakes import FakeEngine

LOAD = Load(sessions=3, history=20, turns=2, input=4, output=5)


async def drive(engine: FakeEngine, load: Load = LOAD) -> tuple[list[Record], int]:
    """Records, and how many turns were heard of."""
    heard: list[None] = []
    records = await driver.drive(engine, load, "load", 0, 300, lambda: heard.append(None))
    return records, len(heard)


async def test_all_turns_come_back_in_order() -> None:
    records, heard = await drive(FakeEngine())
    assert [(record.session, record.turn) for record in records] == [
        (s, t) for s in range(3) for t in range(2)
    ]
    assert {record.outcome for record in records} == {Outcome.COMPLETED}
    assert {(record.input, record.asked, record.tokens) for record in records} == {(4, 5, 5)}
    assert heard == 3 * (1 + 2)
    for record in records:
        assert record.sent >= 0
        assert list(record.arrivals) == sorted(record.arrivals)
        assert record.arrivals[-1] <= record.ended
    for first, second in zip(records[::2], records[1::2], strict=True):
        assert second.sent >= first.sent + first.ended


async def test_a_conversation_is_sent_whole_and_has_what_was_answered() -> None:
    engine = FakeEngine()
    await drive(engine)
    history = tokens(0, "load-1 history", 20, 300)
    first, second = (tokens(0, f"load-1 turn {number}", 4, 300) for number in range(2))
    sent = [turn for turn in engine.turns if turn.session == "load-1"]
    assert [list(turn.tokens) for turn in sent] == [
        history,
        [*history, 1, *first],
        [*history, 1, *first, 1, 2, 3, 4, 5, *second],
    ]
    assert [(turn.fresh, turn.output) for turn in sent] == [(20, 1), (4, 5), (4, 5)]


async def test_all_have_their_history_before_any_is_measured() -> None:
    engine = FakeEngine()
    await drive(engine)
    assert [turn.fresh for turn in engine.turns[:3]] == [20, 20, 20]


@pytest.mark.parametrize(("at_once", "most"), [(1, 1), (2, 2), (None, 3), (7, 3)])
async def test_as_many_take_their_turns_at_once_as_asked(at_once: int | None, most: int) -> None:
    engine = FakeEngine()
    records, _ = await drive(engine, Load(sessions=3, turns=2, input=4, output=5, at_once=at_once))
    assert len(records) == 6
    assert engine.most_running == most


async def test_a_history_that_fails_ends_the_load() -> None:
    with pytest.raises(LoadError, match="the history of session 1: it was cut short, 0 of 1 tokens came"):
        await drive(FakeEngine(short=(1,)))


async def test_a_turn_that_is_cut_short_ends_its_conversation() -> None:
    records, _ = await drive(FakeEngine(short=(3,)))  # the first measured one
    assert len(records) == 5
    assert [record.outcome for record in records].count(Outcome.CUT_SHORT) == 1
    short = next(record for record in records if record.outcome is Outcome.CUT_SHORT)
    assert driver.failure(short) == "it was cut short, 4 of 5 tokens came"


async def test_a_turn_that_fails_has_the_engines_words() -> None:
    records, _ = await drive(FakeEngine(failing=(3,)))
    failed = next(record for record in records if record.outcome is Outcome.FAILED)
    assert (failed.tokens, driver.failure(failed)) == (1, "out of memory")


def test_what_sessions_are_called() -> None:
    assert driver.names(LOAD, "load") == ["load-0", "load-1", "load-2"]
