"""A fake worker, a client for each test, and a way to run the command."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from typer.testing import CliRunner

from apiary_client import Client, aio
from apiary_client.cli.app import app

from .fake_worker import FakeWorker

COMMAND = Path(sys.executable).with_name("apiary")

Run = Callable[..., subprocess.CompletedProcess[str]]


def hearing_ctrl_c(*command: str | Path, first: str = "") -> list[str | Path]:
    """A command that hears interrupts, which whoever runs the tests in the background has ignored; `first` is
    Python that runs before it.

    Not Popen's `preexec_fn`: this process has threads of gRPC, so no Python should run in a fork of it.
    """
    lines = ["import os, signal, sys", "signal.signal(signal.SIGINT, signal.SIG_DFL)", first]
    return [sys.executable, "-c", "\n".join([*lines, "os.execvp(sys.argv[1], sys.argv[1:])"]), *command]


@pytest.fixture
def worker() -> Iterator[FakeWorker]:
    """Start a fake worker for one test."""
    fake = FakeWorker()
    yield fake
    fake.stop()


@pytest.fixture
def client(worker: FakeWorker) -> Iterator[Client]:
    """Connect to the fake worker."""
    with Client(worker.target, tenant="bees") as connected:
        yield connected


@pytest_asyncio.fixture
async def aclient(worker: FakeWorker) -> AsyncIterator[aio.Client]:
    """Connect to the fake worker with asyncio."""
    async with aio.Client(worker.target, tenant="bees") as connected:
        yield connected


@pytest.fixture
def environment(worker: FakeWorker) -> dict[str, str]:
    """Give a process the fake worker as its target, and none of our own settings."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("APIARY_")}
    return {**clean, "APIARY_TARGET": worker.target}


@pytest.fixture
def apiary(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the `apiary` command in this process."""

    def run(*arguments: str, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", environment | variables)
            result = CliRunner().invoke(app, arguments, input=stdin)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return subprocess.CompletedProcess(arguments, result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def process(environment: dict[str, str]) -> Run:
    """Run the `apiary` command in a process of its own."""

    def run(*arguments: str, stdin: str | bytes = "", **variables: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [COMMAND, *arguments],
            input=stdin.encode() if isinstance(stdin, str) else stdin,
            env=environment | variables,
            capture_output=True,
            timeout=30,
        )
        return subprocess.CompletedProcess(
            arguments, done.returncode, done.stdout.decode(), done.stderr.decode()
        )

    return run
