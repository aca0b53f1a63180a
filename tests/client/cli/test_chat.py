"""`apiary chat` with lines on stdin: answers on stdout and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from apiary_client.cli.chat import _names

from ..conftest import COMMAND, Run, hearing_ctrl_c
from ..fake_worker import FakeWorker, status


def test_each_line_is_a_turn(process: Run, worker: FakeWorker) -> None:
    done = process("chat", stdin="My favourite colour is teal.\n\nWhat is it?\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "turn 1: My favourite colour is teal.\nturn 2: What is it?\n"
    assert worker.sessions == {}


def test_a_pipe_is_greedy(apiary: Run, worker: FakeWorker) -> None:
    apiary("chat", "--max-tokens", "7", stdin="hello")
    request = worker.requests[1]
    assert not request.sampling.HasField("temperature")
    assert request.stopping.max_tokens == 7
    apiary("chat", "--temperature", "0.5", "--top-k", "4", "--seed", "3", stdin="hello")
    request = worker.requests[4]
    assert (request.sampling.temperature, request.sampling.top_k, request.sampling.seed) == (0.5, 4, 3)


def test_a_named_session_is_kept_and_resumed(apiary: Run, worker: FakeWorker) -> None:
    assert apiary("chat", "--session", "work", "--policy", "full", stdin="one").stdout == "turn 1: one\n"
    assert apiary("chat", "--session", "work", stdin="two").stdout == "turn 2: two\n"
    assert worker.sessions["sessions/work"].policy == "full"


def test_a_session_keeps_its_policy(apiary: Run) -> None:
    apiary("chat", "--session", "work", "--policy", "full", stdin="one")
    assert apiary("chat", "--session", "work", "--policy", "full", stdin="two").returncode == 0
    done = apiary("chat", "--session", "work", "--policy", "h2o", stdin="three")
    assert (done.returncode, done.stdout) == (1, "")
    assert "created with the policy full" in done.stderr


def test_the_system_message_opens_the_session(apiary: Run, worker: FakeWorker) -> None:
    apiary("chat", "--session", "work", "--system", "Be brief.", stdin="one\ntwo\n")
    turns = [request for request in worker.requests if request.DESCRIPTOR.name == "GenerateRequest"]
    said = [[message.content for message in turn.messages.messages] for turn in turns]
    assert said == [["Be brief.", "one"], ["two"]]
    done = apiary("chat", "--session", "work", "--system", "Be long.", stdin="three")
    assert done.returncode == 1
    assert "may only open a session" in done.stderr


def test_a_failed_turn_ends_the_pipe(process: Run, worker: FakeWorker) -> None:
    done = process("chat", stdin="one\nfail QUEUE_FULL\nthree\n")
    assert done.returncode == 1
    assert done.stdout == "turn 1: one\nturn\n"
    assert done.stderr == "error: it was QUEUE_FULL (try again in 1.5 s)\n"
    assert worker.sessions == {}


def test_no_worker_is_told_with_what_to_do(process: Run) -> None:
    done = process("chat", "--target", "127.0.0.1:1", stdin="hello")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert "is a worker running at 127.0.0.1:1?" in done.stderr


def test_a_session_that_cannot_be_deleted_is_told(apiary: Run, worker: FakeWorker) -> None:
    class Stubborn(dict[str, object]):
        def __delitem__(self, name: str) -> None:
            raise RuntimeError("no")

    worker.sessions = Stubborn()  # type: ignore[assignment]
    done = apiary("chat", stdin="hello")
    assert (done.returncode, done.stdout) == (0, "turn 1: hello\n")
    assert "could not be deleted" in done.stderr


def test_an_expired_session_needs_no_deletion(apiary: Run, worker: FakeWorker) -> None:
    class Forgetful(dict[str, object]):
        def __contains__(self, name: object) -> bool:
            return super().__contains__(name) and not worker.calls["DeleteSessionRequest"]

    worker.sessions = Forgetful()  # type: ignore[assignment]
    done = apiary("chat", stdin="hello")
    assert (done.returncode, done.stdout, done.stderr) == (0, "turn 1: hello\n", "")


def test_bytes_that_are_no_text_are_told(process: Run, worker: FakeWorker) -> None:
    done = process("chat", stdin=b"caf\xe9\n")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: the text is not valid UTF-8\n")
    assert worker.sessions == {}


def test_a_reader_that_leaves_ends_the_chat(worker: FakeWorker, environment: dict[str, str]) -> None:
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; seq 1 500 | {COMMAND} chat | head -1"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.stdout == "turn 1: 1\n"
    assert "Traceback" not in done.stderr
    assert worker.sessions == {}
    assert worker.calls["GenerateRequest"] < 500


@pytest.mark.parametrize("stdin", ["slow please\n", None])
def test_ctrl_c_deletes_the_session(
    worker: FakeWorker, environment: dict[str, str], stdin: str | None
) -> None:
    process = subprocess.Popen(
        hearing_ctrl_c(COMMAND, "chat"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(stdin or "hello\n")
    process.stdin.flush()
    assert process.stdout.read(4) == "turn"
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=10)
    assert process.returncode not in {0, None}
    assert "Traceback" not in said
    assert worker.sessions == {}


def test_a_refused_creation_is_told(apiary: Run, worker: FakeWorker) -> None:
    worker.fail_next = [status("INVALID_FIELD", message="session.policy: unknown policy 'bees'")]
    done = apiary("chat", "--policy", "bees", stdin="hello")
    assert (done.returncode, done.stdout) == (1, "")
    assert "unknown policy 'bees'" in done.stderr


@pytest.mark.parametrize(
    ("spec", "same"),
    [
        ("buzz", True),
        ("buzz(window=64)", True),
        (" buzz( stride=5, window=64 ) ", True),
        ("buzz(sink=4,window=64,threshold=128,stride=5)", True),
        ("buzz(pinned=system)", True),  # by now a number, or nothing
        ("buzz(window=65)", False),
        ("h2o", False),
        ("buzz(window=64,log_n=512)", False),
        ("", False),
    ],
)
def test_a_policy_is_recognised_in_its_full_form(spec: str, same: bool) -> None:
    assert _names(spec, "buzz(sink=4,window=64,threshold=128,stride=5)") is same
