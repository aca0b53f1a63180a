"""`apiary chat` at a terminal: a real pseudo-terminal, keys and all."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import subprocess
import time
from collections.abc import Iterator

import pytest

from ..conftest import COMMAND, hearing_ctrl_c
from ..fake_worker import FakeWorker

_OWN_TERMINAL = "import fcntl, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0)"


class Terminal:
    """Types into a chat and waits for what it shows."""

    def __init__(self, environment: dict[str, str], *arguments: str) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            hearing_ctrl_c(COMMAND, "chat", *arguments, first=_OWN_TERMINAL),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment | {"TERM": "dumb"},
        )
        os.close(slave)
        self._shown = ""

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def wait_for(self, pattern: str, seconds: float = 30) -> str:
        """Return all that was shown up to the pattern's end, and forget it."""
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self._shown)):
            ready, _, _ = select.select([self._master], [], [], max(0, deadline - time.monotonic()))
            if not ready:
                raise AssertionError(f"no {pattern!r} in {self._shown!r}")
            try:
                self._shown += os.read(self._master, 4096).decode(errors="replace")
            except OSError:
                raise AssertionError(f"the chat ended without {pattern!r}: {self._shown!r}") from None
        shown, self._shown = self._shown[: match.end()], self._shown[match.end() :]
        return shown

    def end(self, keys: str = "") -> int:
        """Type what makes the chat leave, if it is not about to, and return its exit status.

        Python loses an interrupt that comes between the prompt and the wait for a key, until the next key.
        """
        for _ in range(5):
            self.type(keys)
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.process.wait(8)
        raise AssertionError(f"the chat does not end: {self._shown!r}")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def terminal(worker: FakeWorker, environment: dict[str, str]) -> Iterator[Terminal]:
    opened = Terminal(environment)
    yield opened
    opened.close()


def test_a_person_chats(terminal: Terminal, worker: FakeWorker) -> None:
    assert "models/fake" in terminal.wait_for("> ")
    terminal.type("hello\r")
    terminal.wait_for("turn 1: hello")
    assert "3 tokens · 4.0 tokens/s" in terminal.wait_for("not computed again")
    terminal.type("again\r")
    terminal.wait_for("turn 2: again")
    sampling = worker.requests[-1].sampling
    assert (sampling.temperature, sampling.top_p) == (pytest.approx(0.2), pytest.approx(0.9))
    assert terminal.end("/quit\r") == 0
    assert worker.sessions == {}


def test_commands(terminal: Terminal, worker: FakeWorker) -> None:
    terminal.wait_for("> ")
    terminal.type("/help\r")
    terminal.wait_for("Ctrl-C   while an answer comes")
    terminal.type("/info\r")
    terminal.wait_for("10 of at most 564 entries")
    terminal.type("/dance\r")
    terminal.wait_for("no command /dance")
    terminal.wait_for("> ")
    terminal.type("\r")
    terminal.wait_for("> ")
    assert terminal.end("\x04") == 0
    assert worker.calls["GenerateRequest"] == 0
    assert worker.sessions == {}


def test_ctrl_c_cancels_the_answer_and_not_the_chat(terminal: Terminal, worker: FakeWorker) -> None:
    terminal.wait_for("> ")
    terminal.type("slow please\r")
    terminal.wait_for("turn 1: slow please")
    terminal.type("\x03")
    terminal.wait_for("as before this turn")
    assert worker.cancelled.wait(5)
    terminal.wait_for("> ")
    terminal.type("hello\r")
    terminal.wait_for("turn 1: hello")
    terminal.wait_for("> ")
    assert terminal.end("\x03") == 0
    assert worker.sessions == {}


def test_a_failed_turn_is_told_and_the_chat_goes_on(terminal: Terminal) -> None:
    terminal.wait_for("> ")
    terminal.type("fail SESSION_BUSY\r")
    terminal.wait_for(r"error: it was SESSION_BUSY \(wait until its other turn ends\)")
    terminal.type("hello\r")
    terminal.wait_for("turn 1: hello")


def test_the_system_message_goes_with_the_first_turn_that_succeeds(
    worker: FakeWorker, environment: dict[str, str]
) -> None:
    terminal = Terminal(environment, "--system", "Be brief.")
    try:
        for line in ("fail QUEUE_FULL", "one", "two"):
            terminal.wait_for("> ")
            terminal.type(f"{line}\r")
        terminal.wait_for("turn 2: two")
    finally:
        terminal.close()
    turns = [request for request in worker.requests if request.DESCRIPTOR.name == "GenerateRequest"]
    assert [len(turn.messages.messages) for turn in turns] == [2, 2, 1]
