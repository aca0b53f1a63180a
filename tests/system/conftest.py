"""One real worker for most tests, and a way to start others. None outlives its tests."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from apiary_client import Client
from tests import tiny

from .worker import APIARY, SMALL, Worker, empty, environment, until

Run = Callable[..., subprocess.CompletedProcess[str]]

_WORKERS = pytest.StashKey[list[Worker]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_WORKERS] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what the workers logged beside what failed."""
    report = yield
    if report.failed:
        for worker in item.config.stash[_WORKERS]:
            report.sections.append((f"worker {worker.process.pid} {worker.target}", worker.stderr[-4000:]))
    return report


@pytest.fixture(scope="session")
def start_worker(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Worker]]:
    """Starts workers with the given arguments; all of them are dead when the tests are over."""
    workers = pytestconfig.stash[_WORKERS]

    def start(*arguments: str) -> Worker:
        worker = Worker(tmp_path_factory.mktemp("worker"), *arguments)
        workers.append(worker)
        return worker.wait_until_ready()

    yield start
    for worker in workers:
        worker.kill()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the tiny model."""
    return tiny.save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def shared_worker(start_worker: Callable[..., Worker], tiny_model: Path) -> Iterator[Worker]:
    """One worker over the tiny model for all tests that leave it as it was."""
    worker = start_worker("--model", str(tiny_model), *SMALL, "--cache-budget", "2MiB", "--metrics-port", "0")
    yield worker
    assert worker.stop() == 0
    assert worker.stdout.count("\n") == 1, "stdout has the ready line alone"


@pytest.fixture
def worker(shared_worker: Worker) -> Iterator[Worker]:
    """The shared worker. After the test it must hold nothing: no turn, no session, no leased byte."""
    yield shared_worker
    assert shared_worker.process.poll() is None, "the worker died"
    with shared_worker.client() as client:
        for session in client.list_sessions(timeout=10):
            client.delete_session(session, timeout=10)
        assert until(lambda: empty(client.get_capacity(timeout=10)), 20), client.get_capacity(timeout=10)


@pytest.fixture
def client(worker: Worker) -> Iterator[Client]:
    """A client of the shared worker."""
    with worker.client() as connected:
        yield connected


@pytest.fixture
def apiary(worker: Worker) -> Run:
    """Runs the `apiary` command against the shared worker, in a process of its own."""

    def run(*arguments: str, stdin: str = "", timeout: float = 60) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [APIARY, *arguments],
            input=stdin.encode(),
            env=environment(APIARY_TARGET=worker.target),
            capture_output=True,
            timeout=timeout,
        )
        # decoded here: subprocess would make "\n" of each "\r", and the tiny model says anything
        return subprocess.CompletedProcess(
            done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
        )

    return run
