"""An engine behind a runner, with a fake one."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from apiary_bench.peers import driver
from apiary_bench.peers.engine import EngineError, Identity, Turn
from apiary_bench.peers.guest import Guest, guest
from apiary_bench.peers.workload import Load

FAKE = Path(__file__).with_name("fake_runner.py")
TURN = Turn("a", (1, 2, 3), 1, 4)


def read(log: Path) -> str:
    """What the runner wrote there."""
    return log.read_text()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Where the runner's stderr goes."""
    return tmp_path / "fake.log"


@asynccontextmanager
async def running(log: Path, does: str | None = None, patience: float = 30.0) -> AsyncIterator[Guest]:
    """A fake runner that does this."""
    settings = {"budget_bytes": 5, "does": does}
    async with guest("fake", [sys.executable, FAKE, "engine"], settings, log, {}, patience) as found:
        yield found


async def answer(engine: Guest, turn: Turn = TURN) -> list[int]:
    """All tokens of a turn."""
    return [token async for piece in engine.take(turn) for token in piece]


async def test_it_says_what_it_is(log: Path) -> None:
    async with running(log) as engine:
        assert engine.identity == Identity(
            version="7", weights="float32", cache="f16", budget_bytes=5, settings="engine", positions=500
        )
    assert "the cause" in read(log)


async def test_answers_find_those_who_asked(log: Path) -> None:
    async with running(log) as engine:
        turns = [Turn(f"{size}", tuple(range(size)), 1, 3) for size in range(1, 30)]
        answers = await asyncio.gather(*(answer(engine, turn) for turn in turns))
    assert answers == [[size, size + 1, size + 2] for size in range(1, 30)]


async def test_it_drives_like_any_engine(log: Path) -> None:
    async with running(log) as engine:
        load = Load(sessions=4, history=9, turns=2, input=3, output=5)
        records = await driver.drive(engine, load, "load", 0, 300, lambda: None)
        assert [record.tokens for record in records] == [5] * 8
        await engine.forget(driver.names(load, "load"))
        await answer(engine)
    assert "forget ['load-0', 'load-1', 'load-2', 'load-3']" in read(log)


async def test_what_it_refuses_is_an_error(log: Path) -> None:
    async with running(log, "refuse") as engine:
        with pytest.raises(EngineError, match=r"^no room$"):
            await answer(engine)


async def test_what_it_cuts_short_is_left_to_be_found(log: Path) -> None:
    async with running(log, "short") as engine:
        assert len(await answer(engine)) == 3


async def test_its_end_is_an_error_for_all_who_wait_and_all_who_come(log: Path) -> None:
    async with running(log, "die") as engine:
        for _ in range(2):
            with pytest.raises(EngineError, match=re.escape(f"fake ended: a warning / the cause ({log})")):
                await answer(engine)


async def test_what_does_not_start_tells_its_last_words(log: Path) -> None:
    with pytest.raises(EngineError, match="fake ended: a warning / the cause"):
        async with running(log, "start"):
            pytest.fail("it started")


async def test_what_is_never_ready_is_given_up(log: Path) -> None:
    with pytest.raises(EngineError, match="fake was not ready after 0 s"):
        async with running(log, "sleep", patience=0.2):
            pytest.fail("it started")


async def test_what_cannot_be_run_is_an_error(log: Path) -> None:
    with pytest.raises(EngineError, match=r"fake cannot be started: .*nothing-here"):
        async with guest("fake", ["/nothing-here"], {"budget_bytes": 1}, log, {}, 1.0):
            pytest.fail("it started")
