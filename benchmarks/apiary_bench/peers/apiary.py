"""Apiary itself, as one more engine: over gRPC, as its callers use it."""

from __future__ import annotations

import asyncio
import secrets
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from importlib.metadata import version
from pathlib import Path

from apiary_bench.peers.engine import EngineError, Identity, Turn
from apiary_bench.peers.process import Process, started
from apiary_bench.peers.workload import Workload
from apiary_client import Stopping, aio
from apiary_client.errors import ApiaryError, SessionNotFound

_PATIENCE = 180.0  # seconds to load a model
_CALL = 30.0  # seconds that a call without a turn may take
_READY = "ready on "
_PROGRAM = "from apiary_client.cli import main; main()"
_LABELS = {"made-by": "apiary bench peers"}


class Worker:
    """A worker, and the connection to it. Sessions are created with their first turn."""

    def __init__(
        self, client: aio.Client, identity: Identity, policy: str | None, process: Process | None
    ) -> None:
        self.identity = identity
        self._client = client
        self._policy = policy
        self._process = process
        self._label = secrets.token_hex(4)
        self._sessions: set[str] = set()

    async def take(self, turn: Turn) -> AsyncGenerator[Sequence[int]]:
        """Take a turn, sending its input alone: the worker keeps the rest.

        Raises:
            EngineError: it failed.
        """
        try:
            name = self._name(turn.session)
            if turn.session not in self._sessions:
                self._sessions.add(turn.session)
                await self._client.create_session(
                    name.removeprefix("sessions/"), policy=self._policy, labels=_LABELS, timeout=_CALL
                )
            stream = self._client.stream(
                token_ids=turn.tokens[-turn.fresh :],
                session=name,
                stopping=Stopping(max_tokens=turn.output, ignore_eos=True),
                timeout=None,  # the point that it belongs to has one
            )
            async with aclosing(stream):
                async for delta in stream:
                    if delta.token_ids:
                        yield delta.token_ids
        except ApiaryError as error:
            raise EngineError(f"{error.reason or error.code.name}: {error.message}") from error

    async def forget(self, sessions: Iterable[str]) -> None:
        """Delete them."""
        for session in self._sessions.intersection(sessions):
            self._sessions.discard(session)
            try:
                await self._client.delete_session(self._name(session), timeout=_CALL)
            except SessionNotFound:
                pass
            except ApiaryError as error:
                raise EngineError(f"{session} was not deleted: {error.message}") from error

    async def close(self) -> None:
        """Delete all that is left."""
        with suppress(EngineError):
            await self.forget(list(self._sessions))

    def memory(self) -> int | None:
        """Resident bytes of the worker; None of one that others started."""
        return None if self._process is None else self._process.memory()

    def _name(self, session: str) -> str:
        return f"sessions/peers-{self._label}-{session}"


class Own:
    """`apiary serve`, started for each workload. Nothing is parked: one budget holds all caches.

    Args:
        name: of the engine.
        model: a pulled model, or a directory.
        precision: of its weights and caches, flags of `apiary serve`.
        policy: of the sessions; None: the worker's default.
        logs: the directory of the worker's log.
    """

    def __init__(
        self, name: str, model: str, precision: Mapping[str, str], policy: str | None, logs: Path
    ) -> None:
        self.name = name
        self._model = model
        self._precision = precision
        self._policy = policy
        self._log = logs / f"{name}.log"

    @asynccontextmanager
    async def start(self, workload: Workload) -> AsyncIterator[Worker]:
        """Start a worker for as many sessions as the workload has.

        Raises:
            EngineError: it does not start.
        """
        flags = {
            "--model": self._model,
            **self._precision,
            "--cache-budget": str(workload.budget_bytes),
            "--parked-budget": "0",
            "--max-running": str(max(64, workload.sessions)),
        }
        async with (
            serving(self.name, flags, self._log) as (process, target),
            aio.Client(target) as client,
            _worker(client, self._policy, process) as worker,
        ):
            yield worker


class Running:
    """A worker that runs already, with whatever settings it has."""

    name = "apiary"

    def __init__(self, target: str, policy: str | None) -> None:
        self._target = target
        self._policy = policy

    @asynccontextmanager
    async def start(self, workload: Workload) -> AsyncIterator[Worker]:
        """Connect to it.

        Raises:
            EngineError: it does not answer.
        """
        async with aio.Client(self._target) as client, _worker(client, self._policy, None) as worker:
            yield worker


@asynccontextmanager
async def serving(name: str, flags: Mapping[str, str], log: Path) -> AsyncIterator[tuple[Process, str]]:
    """`apiary serve` in a process of its own, on a free port; it ends with the context.

    Args:
        name: in errors.
        flags: beside `--listen` and `--log-level`.
        log: takes its stderr, anew.

    Yields:
        The process, and where it listens, once it is ready.

    Raises:
        EngineError: it does not start.
    """
    flags = {"--listen": "127.0.0.1:0", **flags, "--log-level": "warning"}
    command = [sys.executable, "-c", _PROGRAM, "serve", *(part for flag in flags.items() for part in flag)]
    async with started(name, command, log, {}) as process:
        yield process, await _target(process)


@asynccontextmanager
async def _worker(client: aio.Client, policy: str | None, process: Process | None) -> AsyncIterator[Worker]:
    try:
        model = await client.get_model(timeout=_CALL)
        capacity = await client.get_capacity(timeout=_CALL)
    except ApiaryError as error:
        raise EngineError(f"the worker does not answer: {error.message}") from error
    identity = Identity(
        version=version("apiary"),
        weights=model.weight_dtype,
        cache=model.cache_dtype,
        budget_bytes=capacity.budget_bytes,
        settings=f"policy {policy or model.default_policy}, over gRPC",
    )
    worker = Worker(client, identity, policy, process)
    try:
        yield worker
    finally:
        await worker.close()


async def _target(process: Process) -> str:
    """Where the worker listens, from its ready line."""
    try:
        async with asyncio.timeout(_PATIENCE):
            while line := (await process.read()).decode():
                _, found, rest = line.partition(_READY)
                if found:
                    return rest.split()[0]
    except TimeoutError:
        raise EngineError(f"{process.name} was not ready after {_PATIENCE:.0f} s") from None
    raise process.ended()
