"""An engine that runs in a virtual environment of its own, behind `runner.py`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

from apiary_bench.peers.engine import EngineError, Identity, Turn
from apiary_bench.peers.process import Process, started

RUNNER = Path(__file__).with_name("runner.py")


class Guest:
    """A running runner. One task reads its lines and hands them to whoever waits for them."""

    def __init__(self, process: Process, identity: Identity) -> None:
        self.identity = identity
        self._process = process
        self._ids = count()
        self._waiting: dict[int, asyncio.Queue[Mapping[str, Any]]] = {}
        self._end: EngineError | None = None
        self._reader = asyncio.create_task(self._read())

    async def take(self, turn: Turn) -> AsyncGenerator[Sequence[int]]:
        """Take a turn, and yield the answer's token ids as they come.

        Raises:
            EngineError: it failed, or the runner ended.
        """
        if self._end is not None:
            raise self._end
        number = next(self._ids)
        lines = self._waiting[number] = asyncio.Queue()
        request = {"id": number, "session": turn.session, "tokens": turn.tokens, "output": turn.output}
        try:
            await self._process.write(json.dumps(request).encode())
            while "end" not in (line := await lines.get()):
                if "error" in line:
                    raise EngineError(str(line["error"]))
                yield line["tokens"]
        finally:
            del self._waiting[number]

    async def forget(self, sessions: Iterable[str]) -> None:
        """Let go of conversations that have ended."""
        await self._process.write(json.dumps({"forget": list(sessions)}).encode())

    def memory(self) -> int | None:
        """Resident bytes of its processes, shared pages counted once; None where that cannot be told."""
        return self._process.memory()

    def close(self) -> None:
        """Read no more."""
        self._reader.cancel()

    async def _read(self) -> None:
        while line := await self._process.read():
            message = json.loads(line)
            if waiting := self._waiting.get(message["id"]):
                waiting.put_nowait(message)
        self._end = self._process.ended()
        for waiting in self._waiting.values():
            waiting.put_nowait({"error": self._end.message})


@asynccontextmanager
async def guest(
    name: str,
    command: Sequence[str | Path],
    settings: Mapping[str, Any],
    log: Path,
    environment: Mapping[str, str],
    patience: float,
) -> AsyncIterator[Guest]:
    """Start a runner, and wait until its engine runs; it ends with the context.

    Args:
        name: of the engine, in errors.
        command: that runs the runner.
        settings: its last argument, as JSON; `budget_bytes` is repeated in the identity.
        log: takes its stderr.
        environment: beside this process's.
        patience: seconds that it may take.

    Raises:
        EngineError: it cannot be started, or takes longer.
    """
    async with started(name, [*command, json.dumps(settings)], log, environment) as process:
        try:
            line = await asyncio.wait_for(process.read(), patience)
        except TimeoutError:
            raise EngineError(f"{name} was not ready after {patience:.0f} s ({log})") from None
        if not line:
            raise process.ended()
        ready = json.loads(line)["ready"]
        running = Guest(process, Identity(budget_bytes=settings["budget_bytes"], **ready))
        try:
            yield running
        finally:
            running.close()
