"""What a worker is asked, in which order, and what is left on it; the worker is a fake."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import grpc
import pytest

from apiary_bench.errors import LoadError, SettingsError
from apiary_bench.serving import generator
from apiary_bench.serving.generator import Run
from apiary_bench.serving.record import Outcome
from apiary_bench.serving.workload import Arrival, Workload
from apiary_client.errors import ContextFull, Unavailable
from tests.benchmarks.serving.fake_client import MODEL, FakeWorker

GONE = Unavailable("gone", code=grpc.StatusCode.UNAVAILABLE)
FULL = ContextFull("full", code=grpc.StatusCode.FAILED_PRECONDITION, reason="CONTEXT_FULL")


class Heard:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.calls.append((stage, done, total))


async def run(worker: FakeWorker, heard: Heard | None = None, **values: Any) -> Run:
    return await generator.run(Workload(**values), worker.connect, heard or Heard())


async def test_a_whole_load() -> None:
    worker, heard = FakeWorker(), Heard()
    found = await run(
        worker,
        heard,
        sessions=3,
        turns=2,
        history=250,
        input=7,
        output=5,
        warmup=1,
        policy="buzz",
        timeout=9.0,
    )
    assert (found.model, found.policy, worker.policies) == (MODEL, "buzz", {"buzz"})
    assert [(record.session, record.turn) for record in found.records] == [
        (session, turn) for session in range(3) for turn in range(2)
    ]
    assert {record.outcome for record in found.records} == {Outcome.COMPLETED}
    # three parts of history with an answer of a token each, the warm-up, then the first turn
    cached = [record.usage.cached_tokens for record in found.records if record.usage is not None]
    assert cached == [253 + 12, 253 + 24] * 3
    for _, name in worker.created:
        asked = worker.turns_of(name)
        assert [len(turn.token_ids) for turn in asked] == [100, 100, 50, 7, 7, 7]
        assert [turn.max_tokens for turn in asked] == [1, 1, 1, 5, 5, 5]
        assert {turn.timeout for turn in asked} == {9.0}
        assert not {0, 2} & {token for turn in asked for token in turn.token_ids}  # they end a turn
    assert found.after is not None
    assert (found.before.used_bytes, found.after.used_bytes) == (0, 3 * (253 + 36))
    assert (worker.sessions, found.undeleted) == ({}, [])
    assert heard.calls == [
        ("history", 0, 9),
        *(("history", done, 9) for done in range(1, 10)),
        ("warm-up", 0, 3),
        *(("warm-up", done, 3) for done in range(1, 4)),
        ("turns", 0, 6),
        *(("turns", done, 6) for done in range(1, 7)),
    ]


async def test_what_is_not_asked_for_is_no_stage() -> None:
    heard = Heard()
    await run(FakeWorker(), heard, sessions=1, turns=1)
    assert heard.calls == [("turns", 0, 1), ("turns", 1, 1)]


async def test_a_closed_loop_has_all_sessions_at_work_and_one_turn_of_each() -> None:
    worker = FakeWorker()
    found = await run(worker, sessions=40, turns=3, output=4)
    assert worker.most_at_once == 40
    for session in range(40):
        ends = [record.sent + record.ended for record in found.records if record.session == session]
        starts = [record.sent for record in found.records if record.session == session]
        assert all(start >= end for start, end in zip(starts[1:], ends, strict=False))
    assert {record.scheduled for record in found.records} == {None}


async def test_history_comes_few_at_a_time() -> None:
    together = []

    def answer(_session: str, turn: int, most: int) -> Sequence[int | Exception]:
        if turn == 0:
            together.append(worker.at_once)
        return [1] * most

    worker = FakeWorker(answer=answer)
    await run(worker, sessions=50, turns=1, history=10)
    assert max(together) == 16
    assert worker.most_at_once == 50


async def test_tenants_take_turns() -> None:
    worker = FakeWorker()
    await run(worker, sessions=5, turns=1, tenants=("a", "b"))
    assert Counter(tenant for tenant, _ in worker.created) == {"a": 3, "b": 2}
    assert worker.sessions == {}


async def test_open_loops_send_when_the_plan_says() -> None:
    began = perf_counter()
    found = await run(FakeWorker(), sessions=2, turns=2, output=1, rate=20.0, arrival=Arrival.CONSTANT)
    assert perf_counter() - began >= 0.15
    by_time = sorted(found.records, key=lambda record: record.sent)
    assert [(record.session, record.turn) for record in by_time] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert [record.scheduled for record in by_time] == pytest.approx([0, 0.05, 0.1, 0.15])
    assert all(record.delay is not None and 0 <= record.delay < 0.5 for record in by_time)


async def test_a_turn_that_arrives_while_its_session_is_busy_waits_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = generator.measure

    async def slow(*arguments: Any) -> Any:
        await asyncio.sleep(0)
        found = await plain(*arguments)
        await asyncio.sleep(0.06)
        return found

    monkeypatch.setattr(generator, "measure", slow)
    found = await run(FakeWorker(), sessions=1, turns=2, output=1, rate=1000.0, arrival=Arrival.CONSTANT)
    first, second = found.records
    assert first.delay is not None
    assert first.delay < 0.5
    assert second.scheduled == 0.001
    assert second.delay is not None
    assert second.delay >= 0.05


async def test_think_time_passes_between_turns() -> None:
    found = await run(FakeWorker(), sessions=1, turns=4, output=1, think=0.03, seed=1)
    pauses = [
        after.sent - before.sent - before.ended
        for before, after in zip(found.records, found.records[1:], strict=False)
    ]
    assert max(pauses) > 0.01
    assert len(set(pauses)) == 3


async def test_after_a_cancel_the_next_turn_waits_for_the_rollback() -> None:
    worker = FakeWorker(rollback=3)
    found = await run(worker, sessions=4, turns=5, output=6, cancel_rate=0.5)
    outcomes = Counter(record.outcome for record in found.records)
    assert outcomes == {Outcome.COMPLETED: 10, Outcome.CANCELLED: 10}
    for record in found.records:
        assert (record.cancel_after is None) == (record.outcome is Outcome.COMPLETED)
        assert record.tokens == (record.cancel_after or 6)
    # a cancelled turn leaves nothing behind
    for session in range(4):
        kept = 0
        for record in found.records[session * 5 : session * 5 + 5]:
            if record.usage is not None:
                assert record.usage.cached_tokens == kept
                kept += 32 + 6


async def test_a_failed_turn_is_recorded_and_its_session_goes_on() -> None:
    def answer(_session: str, turn: int, most: int) -> Sequence[int | Exception]:
        return [1, FULL] if turn == 1 else [1] * most

    worker = FakeWorker(answer=answer)
    found = await run(worker, sessions=2, turns=3, output=2)
    assert [record.outcome for record in found.records] == [
        Outcome.COMPLETED,
        Outcome.FAILED,
        Outcome.COMPLETED,
    ] * 2
    assert found.records[1].reason == "CONTEXT_FULL"
    assert worker.sessions == {}


@pytest.mark.parametrize(
    ("answer", "why"),
    [([FULL], "turn 1: CONTEXT_FULL: full"), ([0], "turn 1: it was cut short")],
)
@pytest.mark.parametrize(("stage", "values"), [("history", {"history": 150}), ("warm-up", {"warmup": 2})])
async def test_without_its_preparation_there_is_no_load(
    stage: str, values: dict[str, int], answer: list[int | Exception], why: str
) -> None:
    worker = FakeWorker(answer=lambda _session, turn, most: [1] * most if turn == 0 else answer)
    with pytest.raises(LoadError, match=f"^{stage} of sessions/bench-.*, {why}$"):
        await run(worker, sessions=3, turns=1, output=1, **values)
    assert (len(worker.created), worker.sessions) == (3, {})


async def test_a_model_that_never_takes_such_turns_gets_no_sessions() -> None:
    worker = FakeWorker()
    with pytest.raises(SettingsError, match="input must be at most 100"):
        await run(worker, input=101)
    assert worker.created == []


async def test_sessions_are_deleted_when_the_run_is_stopped() -> None:
    begun = asyncio.Event()

    def answer(_session: str, _turn: int, most: int) -> Sequence[int | Exception]:
        begun.set()
        return [1] * most

    worker = FakeWorker(answer=answer)
    task = asyncio.create_task(run(worker, sessions=30, turns=100, output=900))
    await begun.wait()
    assert len(worker.sessions) == 30
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (worker.sessions, worker.at_once) == ({}, 0)


async def test_sessions_that_cannot_be_deleted_are_named() -> None:
    worker = FakeWorker(undeletable=GONE)
    found = await run(worker, sessions=2, turns=1)
    assert found.undeleted == sorted(name for _, name in worker.created)
    assert len(found.records) == 2


async def test_a_session_that_is_gone_needs_no_deletion() -> None:
    def answer(session: str, _turn: int, _most: int) -> Sequence[int | Exception]:
        del worker.sessions[None, session]
        return [FULL]

    worker = FakeWorker(answer=answer)
    found = await run(worker, sessions=2, turns=1)
    assert (found.undeleted, worker.sessions) == ([], {})
