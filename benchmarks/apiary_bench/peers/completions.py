"""A server of others that speaks OpenAI's completions API, and its client: HTTP on this machine.

The API is https://platform.openai.com/docs/api-reference/completions with additions of vLLM: prompts and
answers as token ids (`return_token_ids`), and answers of an exact length (`min_tokens`, `ignore_eos`).
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path

import httpx2

from apiary_bench.peers.engine import EngineError, Identity, Turn
from apiary_bench.peers.process import Process, started

_LOOK = 0.2  # seconds between questions whether it is ready


class Server:
    """A running server. It knows no sessions: each turn sends its conversation whole, and what the server has
    kept of it by itself need not be computed again."""

    def __init__(self, client: httpx2.AsyncClient, model: str, identity: Identity, process: Process) -> None:
        self.identity = identity
        self._client = client
        self._model = model
        self._process = process

    async def take(self, turn: Turn) -> AsyncGenerator[Sequence[int]]:
        """Take a turn, and yield the answer's token ids as they come.

        Raises:
            EngineError: it failed.
        """
        request = {
            "model": self._model,
            "prompt": turn.tokens,
            "max_tokens": turn.output,
            "min_tokens": turn.output,
            "ignore_eos": True,
            "temperature": 0.0,
            "return_token_ids": True,
            "stream": True,
        }
        try:
            async with self._client.stream("POST", "/v1/completions", json=request) as response:
                if response.is_error:
                    raise EngineError(f"HTTP {response.status_code}: {(await response.aread()).decode()}")
                async for line in response.aiter_lines():
                    kind, _, content = line.partition(": ")
                    if kind == "data" and content != "[DONE]":
                        event = json.loads(content)
                        if "error" in event:
                            raise EngineError(str(event["error"]))
                        yield event["choices"][0]["token_ids"]
        except httpx2.HTTPError as error:
            raise EngineError(f"{type(error).__name__}: {error}") from error

    async def forget(self, sessions: Iterable[str]) -> None:
        """Nothing: a server forgets what it has no room for."""

    def memory(self) -> int | None:
        """Resident bytes of its processes, shared pages counted once; None where that cannot be told."""
        return self._process.memory()


@asynccontextmanager
async def serving(
    name: str,
    command: Sequence[str],
    model: str,
    identity: Identity,
    log: Path,
    environment: Mapping[str, str],
    patience: float,
) -> AsyncIterator[Server]:
    """Start a server on a free port, and wait until it is healthy; it ends with the context.

    Args:
        name: of the engine, in errors.
        command: that starts it; `--host` and `--port` are added.
        model: what the server calls it.
        identity: what it is.
        log: takes its stderr.
        environment: beside this process's.
        patience: seconds that it may take.

    Raises:
        EngineError: it cannot be started, ends, or takes longer.
    """
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    whole = [*command, "--host", "127.0.0.1", "--port", str(port)]
    unbounded = httpx2.Limits(max_connections=None)
    async with (
        started(name, whole, log, environment) as process,
        # no timeout: the point that a turn belongs to has one; no proxy: it is on this machine
        httpx2.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", timeout=None, limits=unbounded, trust_env=False
        ) as client,
    ):
        await _healthy(process, client, log, patience)
        yield Server(client, model, identity, process)


async def _healthy(process: Process, client: httpx2.AsyncClient, log: Path, patience: float) -> None:
    ended = asyncio.create_task(_ended(process))
    try:
        async with asyncio.timeout(patience):
            while not ended.done():
                try:
                    if (await client.get("/health")).is_success:
                        return
                except httpx2.TransportError:
                    pass  # it does not listen yet
                await asyncio.wait([ended], timeout=_LOOK)
    except TimeoutError:
        raise EngineError(f"{process.name} was not ready after {patience:.0f} s ({log})") from None
    finally:
        ended.cancel()
    raise process.ended()


async def _ended(process: Process) -> None:
    """Read what the server prints, which is of no use, until it ends."""
    while await process.read():
        pass
