"""A worker as an operator runs it: `apiary serve` in a process of its own, on a free port."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self, TypeVar

import apiary_client
from apiary_client import Capacity, Client

APIARY = Path(sys.executable).with_name("apiary")
START_SECONDS = 90.0
STOP_SECONDS = 30.0

# Small enough that a chat of a few words compacts its cache; every size is a part of what the tests show.
POLICY = "buzz(sink=2,window=8,threshold=20,stride=5)"
SMALL = ("--threads", "1", "--policy", POLICY, "--slack", "16", "--workspace-entries", "256")

Value = TypeVar("Value")


class Worker:
    """`apiary serve` with these arguments beside `--listen`; its output goes to files in `directory`.

    Attributes:
        process: the running process.
        target: `host:port`, from the ready line.
        ready_seconds: from the start of the process to that line.
    """

    def __init__(self, directory: Path, *arguments: str) -> None:
        directory.mkdir(exist_ok=True)
        self._out, self._err = directory / "out", directory / "err"
        self._began = time.monotonic()
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [APIARY, "serve", "--listen", "127.0.0.1:0", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=environment(),
                start_new_session=True,  # a Ctrl-C for the tests is not one for the worker
            )
        self.target = ""
        self.ready_seconds = 0.0

    def wait_until_ready(self) -> Self:
        """Wait for the ready line."""
        ready = until(lambda: self._ready() or self.process.poll() is not None, START_SECONDS, every=0.01)
        line = self._ready()
        assert ready, f"not ready after {START_SECONDS} s:\n{self.stderr}"
        assert line is not None, f"ended with {self.process.returncode} before it was ready:\n{self.stderr}"
        self.ready_seconds = time.monotonic() - self._began
        self.target = line[1]
        return self

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def wait(self, seconds: float = STOP_SECONDS) -> int:
        """Wait for its end and return its exit code."""
        return self.process.wait(seconds)

    def stop(self) -> int:
        """Have it drain, and return its exit code."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """End it whatever it does; any often."""
        self.process.kill()
        self.process.wait(STOP_SECONDS)

    @property
    def stdout(self) -> str:
        """What it printed so far."""
        return self._out.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        """What it logged so far."""
        return self._err.read_text(errors="replace")

    @property
    def metrics_port(self) -> int:
        """Where Prometheus may scrape it (with `--metrics-port 0`), as its log says."""
        events = [json.loads(line) for line in self.stderr.splitlines() if line.startswith("{")]
        return next(int(event["port"]) for event in events if event["event"] == "metrics can be scraped")

    def client(self, tenant: str | None = None) -> Client:
        """A client of its own connection."""
        return Client(self.target, tenant=tenant)

    def _ready(self) -> re.Match[str] | None:
        return re.search(r"^apiary: ready on (127\.0\.0\.1:[1-9]\d*) \(.*\)\n", self.stdout, re.M)


def environment(**variables: str) -> dict[str, str]:
    """This process's environment without settings of ours, and with these variables."""
    return {key: value for key, value in os.environ.items() if not key.startswith("APIARY_")} | variables


def until(condition: Callable[[], Value], seconds: float, *, every: float = 0.02) -> Value:
    """Ask again until the answer is true or the time is over; returns the last answer."""
    end = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(every)
    return value


def empty(capacity: Capacity) -> bool:
    """Whether nothing runs, and nothing is kept or leased but the workspaces, which are always counted."""
    return (
        capacity.running_turns == capacity.queued_turns == capacity.sessions == capacity.parked_bytes == 0
        and capacity.used_bytes == capacity.workspaces * capacity.workspace_bytes
    )


def settled(
    client: Client, session: apiary_client.Session | str, seconds: float = 10.0
) -> apiary_client.Session:
    """The session once no turn of it is in flight."""
    looked = until(
        lambda: look if (look := client.get_session(session)).state != apiary_client.State.BUSY else None,
        seconds,
    )
    assert looked is not None, f"{session} is still busy after {seconds} s"
    return looked
