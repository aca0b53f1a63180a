"""The protocol's other end, with an engine that is none. No engine of others is imported."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from apiary_bench.peers import runner
from apiary_bench.peers.guest import RUNNER


class Echo:
    """Answers with the prompt's tokens, two a piece; to `first` not before `second` has come."""

    def __init__(self) -> None:
        self.ready: dict[str, Any] = {"version": "1"}
        self._second = asyncio.Event()
        self.forgotten: list[str] = []

    async def take(self, session: str, tokens: list[int], output: int) -> AsyncGenerator[list[int]]:
        """Answer."""
        if session == "bad":
            raise ValueError("no such session")
        if session == "first":
            await self._second.wait()
        if session == "second":
            self._second.set()
        for first in range(0, output, 2):
            await asyncio.sleep(0)
            yield []
            yield tokens[first : first + 2]

    def forget(self, session: str) -> None:
        """Note it."""
        self.forgotten.append(session)

    def stop(self) -> None:
        """Nothing."""


async def talk(engine: Echo, *requests: dict[str, Any], answers: int) -> list[dict[str, Any]]:
    """What comes back for these requests, until so many have ended."""
    take, give = os.pipe()
    hear, say = os.pipe()
    with os.fdopen(take, "rb") as incoming, os.fdopen(say, "wb") as outgoing, os.fdopen(hear, "rb") as lines:
        task = asyncio.create_task(runner._serve(engine, incoming, outgoing))
        with os.fdopen(give, "wb") as stdin:
            for request in requests:
                stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
            found = []
            while sum("end" in line or "error" in line for line in found) < answers:
                found.append(json.loads(await asyncio.to_thread(lines.readline)))
        await task
    return found


async def test_it_says_when_it_is_ready_and_answers_in_pieces() -> None:
    found = await talk(Echo(), {"id": 4, "session": "a", "tokens": [1, 2, 3, 4, 5], "output": 4}, answers=1)
    assert found == [
        {"ready": {"version": "1"}},
        {"id": 4, "tokens": [1, 2]},
        {"id": 4, "tokens": [3, 4]},
        {"id": 4, "end": True},
    ]


async def test_requests_are_answered_at_the_same_time() -> None:
    requests = [{"id": name, "session": name, "tokens": [1], "output": 1} for name in ("first", "second")]
    found = [line["id"] for line in await talk(Echo(), *requests, answers=2) if "end" in line]
    assert sorted(found) == ["first", "second"]


async def test_what_an_engine_raises_is_told_and_others_go_on() -> None:
    bad = {"id": 1, "session": "bad", "tokens": [1], "output": 1}
    good = {"id": 2, "session": "a", "tokens": [7], "output": 1}
    found = await talk(Echo(), bad, good, answers=2)
    assert {"id": 1, "error": "ValueError: no such session"} in found
    assert {"id": 2, "tokens": [7]} in found


async def test_sessions_are_forgotten() -> None:
    engine = Echo()
    last = {"id": 1, "session": "a", "tokens": [1], "output": 1}
    await talk(engine, {"forget": ["a", "b"]}, last, answers=1)
    assert engine.forgotten == ["a", "b"]


def test_libraries_are_named_by_their_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/a/libiomp5.so:libtcmalloc_minimal.so.4")
    assert runner._preloaded() == "libiomp5.so and libtcmalloc_minimal.so.4"
    monkeypatch.delenv("LD_PRELOAD")
    assert runner._preloaded() == "nothing"


def test_it_needs_nothing_of_ours() -> None:
    done = subprocess.run(
        [sys.executable, "-I", RUNNER, "none", "{}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == "KeyError: 'none'"
