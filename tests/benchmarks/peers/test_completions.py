"""A server of OpenAI's completions API, with a fake one."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from apiary_bench.peers import driver
from apiary_bench.peers.completions import Server, serving
from apiary_bench.peers.engine import EngineError, Identity, Turn
from apiary_bench.peers.workload import Load

FAKE = Path(__file__).with_name("fake_server.py")
TURN = Turn("a", (1, 2, 3), 1, 4)
IDENTITY = Identity(version="7", weights="float32", cache="float32", budget_bytes=5, settings="fake")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Where the server's stderr goes."""
    return tmp_path / "fake.log"


@asynccontextmanager
async def running(log: Path, does: str = "well", patience: float = 30.0) -> AsyncIterator[Server]:
    """A fake server that does this."""
    command = [sys.executable, str(FAKE), does]
    async with serving("fake", command, "model", IDENTITY, log, {}, patience) as found:
        yield found


async def answer(server: Server, turn: Turn = TURN) -> list[int]:
    """All tokens of a turn."""
    return [token async for piece in server.take(turn) for token in piece]


async def test_answers_find_those_who_asked(log: Path) -> None:
    async with running(log) as server:
        assert server.identity is IDENTITY
        assert (server.memory() or 0) > 2**20
        turns = [Turn(f"{size}", tuple(range(size)), 1, 3) for size in range(1, 20)]
        answers = await asyncio.gather(*(answer(server, turn) for turn in turns))
    assert answers == [[size, size + 1, size + 2] for size in range(1, 20)]
    assert "the cause" in await asyncio.to_thread(log.read_text)


async def test_it_drives_like_any_engine(log: Path) -> None:
    async with running(log) as server:
        load = Load(sessions=4, history=9, turns=2, input=3, output=5)
        records = await driver.drive(server, load, "load", 0, 300, lambda: None)
        await server.forget(driver.names(load, "load"))
    assert [record.tokens for record in records] == [5] * 8


async def test_what_it_refuses_is_an_error(log: Path) -> None:
    async with running(log, "refuse") as server:
        with pytest.raises(EngineError, match=re.escape('HTTP 400: {"error": "no room"}')):
            await answer(server)


async def test_an_error_in_the_middle_is_one(log: Path) -> None:
    async with running(log, "fail") as server, aclosing(server.take(TURN)) as pieces:
        assert await anext(pieces) == [3]
        with pytest.raises(EngineError, match="broken"):
            await anext(pieces)


async def test_what_it_cuts_short_is_left_to_be_found(log: Path) -> None:
    async with running(log, "short") as server:
        assert len(await answer(server)) == 3


async def test_its_end_is_an_error_for_all_who_come(log: Path) -> None:
    async with running(log, "die") as server:
        for _ in range(2):
            with pytest.raises(EngineError, match=r"RemoteProtocolError|ConnectError|ReadError"):
                await answer(server)


async def test_what_does_not_start_tells_its_last_words(log: Path) -> None:
    with pytest.raises(EngineError, match="fake ended: a warning / the cause"):
        async with running(log, "start"):
            pytest.fail("it started")


async def test_what_is_never_healthy_is_given_up(log: Path) -> None:
    with pytest.raises(EngineError, match=r"fake was not ready after 1 s \(.*fake\.log\)"):
        async with running(log, "sleep", patience=0.6):
            pytest.fail("it started")
