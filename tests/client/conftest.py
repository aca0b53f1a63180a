"""A fake worker, a client for each test, and a way to run the command."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from apiary_client import Client, aio

from .fake_worker import FakeWorker

Run = Callable[..., subprocess.CompletedProcess[str]]


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
    return {**clean, "APIARY_TARGET": worker.target, "COLUMNS": "200", "NO_COLOR": "1"}


@pytest.fixture
def apiary(environment: dict[str, str]) -> Run:
    """Run the `apiary` command in a process of its own."""

    def run(*arguments: str, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(Path(sys.executable).with_name("apiary")), *arguments],
            input=stdin,
            env=environment | variables,
            capture_output=True,
            text=True,
            timeout=30,
        )

    return run
