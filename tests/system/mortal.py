"""Workers that can be told where to die, started quickly; see `mortal_workers`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from .worker import Worker, environment

ROOT = Path(__file__).parents[2]


class Parent:
    """The process from which workers are forked, one at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.system.mortal_workers"],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tell(self, **order: object) -> None:
        """Have it fork a worker."""
        assert self._process.stdin is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)

    def number(self) -> int:
        """What it prints next: a worker's process id, then its exit code."""
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def end(self) -> None:
        """End it; its worker must have ended."""
        self._process.kill()
        self._process.communicate()


class Forked:
    """A worker's process, as `subprocess.Popen` would show it."""

    def __init__(self, parent: Parent, **order: object) -> None:
        parent.tell(**order)
        self.pid = parent.number()
        self._code: list[int] = []
        self._ended = threading.Thread(target=lambda: self._code.append(parent.number()), daemon=True)
        self._ended.start()

    @property
    def returncode(self) -> int | None:
        """The exit code, if it has ended."""
        return self._code[0] if self._code else None

    def poll(self) -> int | None:
        """The same."""
        return self.returncode

    def wait(self, seconds: float) -> int:
        """The exit code, when it has ended."""
        self._ended.join(seconds)
        if not self._code:
            raise subprocess.TimeoutExpired("a worker", seconds)
        return self._code[0]

    def kill(self) -> None:
        """End it, if it runs."""
        if not self._code:
            os.kill(self.pid, signal.SIGKILL)


class Mortal(Worker):
    """A worker that was forked from a parent; any often in one directory, after the one before has ended."""

    process: Any

    def __init__(self, parent: Parent, directory: Path, *arguments: str) -> None:
        self._out, self._err, self._fate = (directory / name for name in ("out", "err", "fate"))
        for file in (self._out, self._err, self._fate):
            file.unlink(missing_ok=True)
        self._began, self.target = time.monotonic(), ""
        arguments = ("--listen", "127.0.0.1:0", *arguments)
        self.process = Forked(parent, directory=str(directory), arguments=arguments)

    @property
    def stdout(self) -> str:
        """What it printed so far."""
        return super().stdout if self._out.exists() else ""

    def dies_at(self, point: str, number: int) -> None:
        """It will when it passes that point for the `number`-th time from now."""
        written = self._fate.with_suffix(".new")
        written.write_text(f"{number} {point}")
        written.replace(self._fate)

    def killed(self, seconds: float) -> bool:
        """Wait for its end; whether it was killed."""
        return bool(self.wait(seconds) == -signal.SIGKILL)
