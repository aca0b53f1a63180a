"""The real model as a user meets it: how soon it answers, and `make chat`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from apiary_client import Stopping

from .worker import Worker

pytestmark = [
    pytest.mark.model,
    pytest.mark.usefixtures("default_model"),
    pytest.mark.timeout(300),
]

ROOT = Path(__file__).parents[2]
ATTEMPTS = 3
READY_SECONDS, FIRST_TOKEN_SECONDS = 10.0, 1.0
IMPORT_SECONDS = 1.6  # of the libraries, on a machine that keeps these limits; a slower one has more time
LINES = ("My favourite colour is teal.", "What is my favourite colour?")


def _first_token_seconds(worker: Worker) -> float:
    """From a short chat to the first piece of its answer: the first request that the worker ever sees."""
    with worker.client() as client:
        began = time.monotonic()
        stream = client.stream("Hello!", stopping=Stopping(max_tokens=8), timeout=60)
        next(stream)
        seconds = time.monotonic() - began
        list(stream)
    return seconds


@pytest.mark.alone
def test_a_started_worker_answers_at_once(start_worker: Callable[..., Worker]) -> None:
    """The machine may be busy with other things: the best of three starts counts, for either figure, and what
    another process takes beside them."""
    ready, first = [], []
    for _ in range(ATTEMPTS):
        imports = min(_import_seconds() for _ in range(2))  # the first one may read files
        slowness = max(1.0, imports / IMPORT_SECONDS)
        worker = start_worker()
        ready.append(worker.ready_seconds / slowness)
        first.append(_first_token_seconds(worker) / slowness)
        assert worker.stop() == 0
        if min(ready) < READY_SECONDS and min(first) < FIRST_TOKEN_SECONDS:
            break
    print(f"ready after {_list(ready)} s, first token {_list(first)} s after the request")
    assert min(ready) < READY_SECONDS
    assert min(first) < FIRST_TOKEN_SECONDS


def _import_seconds() -> float:
    """Of what a worker imports before anything else."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import grpc, torch, transformers"], check=True, timeout=120)
    return time.monotonic() - began


def _list(seconds: list[float]) -> str:
    return ", ".join(f"{one:.2f}" for one in seconds)


def _make_chat(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    inherited = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MODEL", "ARGS"}  # of the `make test` that runs this
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in inherited and not key.startswith("APIARY_")
    }
    return subprocess.run(
        ["make", "chat", *arguments],
        cwd=ROOT,
        env=environment,
        input="".join(f"{line}\n" for line in LINES).encode(),
        capture_output=True,
        timeout=200,
    )


def test_make_chat() -> None:
    """Two lines in, two answers out, as a user would type it."""
    chat = _make_chat()
    assert chat.returncode == 0, chat.stderr.decode()
    assert b"chat: starting a worker" in chat.stderr
    assert chat.stdout.decode().lower().count("teal") >= 2, "once in each answer"


def test_make_chat_prints_the_answers_and_nothing_else() -> None:
    """Answers of so few tokens that the model does not break the line."""
    chat = _make_chat("ARGS=--max-tokens 16")
    assert chat.returncode == 0, chat.stderr.decode()
    answers = chat.stdout.decode().splitlines()
    assert len(answers) == 2
    assert "teal" in answers[1].lower()
