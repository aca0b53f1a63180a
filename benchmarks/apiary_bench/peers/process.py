"""The processes that engines run in: started with a log, watched, and ended with all that they started."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from apiary_bench.peers.engine import EngineError

_GRACE = 20.0  # seconds from the wish to end until the end is forced
_LOOK = 0.02  # seconds between looks at whether it has ended
_LINE_BYTES = 2**26  # the longest line that is read
_WORDS = 3  # last lines of the log that an error repeats


class Process:
    """A running program, in a session of its own, that reads stdin and writes stdout; stderr is in `log`."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self._process = process
        self._log = log

    async def write(self, line: bytes) -> None:
        """Send a line.

        Raises:
            EngineError: it has ended.
        """
        stdin = self._process.stdin
        assert stdin is not None  # noqa: S101 - a pipe was asked for
        with suppress(ConnectionError):
            stdin.write(line + b"\n")
            await stdin.drain()
        if stdin.is_closing():  # which drain may be too early to know
            raise self.ended()

    async def read(self) -> bytes:
        """The next line; empty at its end."""
        assert self._process.stdout is not None  # noqa: S101 - a pipe was asked for
        return await self._process.stdout.readline()

    def ended(self) -> EngineError:
        """That it ended by itself, with the last lines of its log."""
        with suppress(OSError):
            lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
            if lines:
                return EngineError(f"{self.name} ended: {' / '.join(lines[-_WORDS:])} ({self._log})")
        return EngineError(f"{self.name} ended without a word")

    def memory(self) -> int | None:
        """Resident bytes of it and all that it started, shared pages counted once; None without /proc."""
        return _resident(self._process.pid)

    def kill(self) -> None:
        """End it by force, whatever it does."""
        with suppress(ProcessLookupError):
            self._process.kill()

    async def stop(self) -> None:
        """End it by asking, then by force, with all that it started and left."""
        with suppress(ProcessLookupError):
            self._process.terminate()
        try:
            async with asyncio.timeout(_GRACE):
                while self._process.returncode is None:  # noqa: ASYNC110 - wait() waits for its children, too
                    await asyncio.sleep(_LOOK)
        except TimeoutError:
            pass
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            await self._process.wait()


@asynccontextmanager
async def started(
    name: str, command: Sequence[str | Path], log: Path, environment: Mapping[str, str]
) -> AsyncIterator[Process]:
    """Start a program in a session of its own; it ends with the context.

    Args:
        name: in errors.
        command: with the program first.
        log: takes its stderr, anew.
        environment: beside this process's, without Apiary's own settings.

    Raises:
        EngineError: it cannot be started.
    """
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("APIARY_")}
    try:
        with log.open("wb") as errors:
            running = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                env=inherited | dict(environment),
                limit=_LINE_BYTES,
                start_new_session=True,  # a Ctrl-C is for us, who end it
            )
    except OSError as error:
        raise EngineError(f"{name} cannot be started: {error}") from error
    process = Process(name, running, log)
    try:
        yield process
    finally:
        await process.stop()


def _resident(session: int) -> int | None:
    """The proportional set size of all processes of a session, in bytes."""
    found = None
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):
            if os.getsid(int(directory.name)) == session:
                rollup = (directory / "smaps_rollup").read_text()
                kilobytes = next(line.split()[1] for line in rollup.splitlines() if line.startswith("Pss:"))
                found = (found or 0) + 1024 * int(kilobytes)
    return found
