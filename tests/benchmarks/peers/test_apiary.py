"""Apiary as one more engine, with a worker that is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from apiary_bench.peers import apiary, driver
from apiary_bench.peers.apiary import Own, Running
from apiary_bench.peers.engine import EngineError, Turn
from apiary_bench.peers.workload import Load
from apiary_client import aio
from apiary_client.errors import ApiaryError
from tests.benchmarks.serving.fake_client import FakeWorker

from .fakes import workload

LOAD = Load(sessions=3, history=9, turns=2, input=4, output=5)
WORKLOAD = workload(LOAD)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeWorker:
    """The worker that every client talks to."""
    worker = FakeWorker()
    monkeypatch.setattr(aio, "Client", lambda target: worker.connect(target))
    return worker


async def test_only_what_is_new_is_sent_and_sessions_are_deleted(fake: FakeWorker) -> None:
    async with Running("there:1", "buzz").start(WORKLOAD) as engine:
        records = await driver.drive(engine, LOAD, "load", 0, 300, lambda: None)
        assert [record.tokens for record in records] == [5] * 6
        assert [len(asked.token_ids) for asked in fake.asked[:3]] == [9] * 3
        assert [len(asked.token_ids) for asked in fake.asked[3:]] == [4] * 6
        # each has its history and an answer to it, then two turns
        assert set(fake.sessions.values()) == {9 + 1 + 2 * (4 + 5)}
        assert fake.policies == {"buzz"}
        assert engine.memory() is None
        await engine.forget([*driver.names(LOAD, "load"), "unknown"])
        assert fake.sessions == {}


async def test_it_says_what_the_worker_says_of_itself(fake: FakeWorker) -> None:
    async with Running("there:1", None).start(WORKLOAD) as engine:
        found = engine.identity
    assert (found.weights, found.cache, found.budget_bytes) == ("float32", "bfloat16", 2**30)
    assert found.settings == "policy buzz, over gRPC"
    assert found.positions is None


async def test_what_is_left_is_deleted_at_the_end(fake: FakeWorker) -> None:
    async with Running("there:1", None).start(WORKLOAD) as engine:
        answer = [token async for piece in engine.take(Turn("a", (7, 8), 2, 3)) for token in piece]
        assert len(answer) == 3
        assert len(fake.sessions) == 1
    assert fake.sessions == {}


async def test_what_the_worker_refuses_is_an_error(fake: FakeWorker) -> None:
    def full(session: str, turn: int, most: int) -> Sequence[int | Exception]:
        error = ApiaryError("the queue is full", code=grpc.StatusCode.RESOURCE_EXHAUSTED)
        return [1, error]

    fake.answer = full
    async with Running("there:1", None).start(WORKLOAD) as engine:
        with pytest.raises(EngineError, match="RESOURCE_EXHAUSTED: the queue is full"):
            async for _ in engine.take(Turn("a", (7, 8), 2, 3)):
                pass


async def test_a_worker_that_is_not_there_is_an_error() -> None:
    with pytest.raises(EngineError, match="the worker does not answer"):
        async with Running("127.0.0.1:1", None).start(WORKLOAD):
            pytest.fail("it answered")


@pytest.mark.usefixtures("fake")
async def test_an_own_worker_is_sized_for_the_workload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a program that tells its arguments, and is ready
    arguments = tmp_path / "arguments"
    program = f"""
import pathlib, sys
pathlib.Path({str(arguments)!r}).write_text(" ".join(sys.argv[1:]))
print("apiary: ready on 127.0.0.1:7 (model m)", flush=True)
sys.stdin.read()
"""
    monkeypatch.setattr(apiary, "_PROGRAM", program)
    own = Own("apiary-int8", "m", {"--weights": "int8", "--cache-dtype": "bfloat16"}, None, tmp_path)
    async with own.start(workload(replace(LOAD, sessions=100))) as engine:
        memory = engine.memory()
        assert memory is None or memory > 0
    assert " ".join(arguments.read_text().split()[1:]) == (
        "--listen 127.0.0.1:0 --model m --weights int8 --cache-dtype bfloat16 --cache-budget 1073741824 "
        "--parked-budget 0 --max-running 100 --log-level warning"
    )


async def test_a_worker_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apiary, "_PROGRAM", "raise SystemExit('no such model')")
    with pytest.raises(EngineError, match="apiary-fp32 ended: no such model"):
        async with Own("apiary-fp32", "m", {"--weights": "fp32"}, None, tmp_path).start(WORKLOAD):
            pytest.fail("it started")
