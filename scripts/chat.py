"""Start a worker on a free port, chat with it here, and stop it, whatever happens: `make chat`.

Stdin and stdout are the chat's alone. The worker's log is kept in a temporary file and shown when it fails.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

APIARY = Path(sys.executable).with_name("apiary")
START_SECONDS = 120
STOP_SECONDS = 10
LOG_LINES = 30
ENDINGS = (signal.SIGTERM, signal.SIGHUP)


def main(model: str, *arguments: str) -> int:
    """Chat with `model`, a name or a path; the rest are arguments of `apiary chat`. Returns its exit code."""
    for number in ENDINGS:
        signal.signal(number, _leave)
    _say(f"starting a worker with {model} ...")
    with (
        tempfile.TemporaryDirectory(prefix="apiary-chat-") as directory,
        Worker(model, Path(directory)) as worker,
    ):
        address = worker.wait_until_ready()
        if address is None:
            worker.show_log("the worker did not start")
            return 1
        # Ctrl-C belongs to the chat, in which it ends an answer. A handler, unlike SIG_IGN, is not inherited.
        signal.signal(signal.SIGINT, lambda *_: None)
        code = _chat(address, arguments)
        if worker.process.poll() is not None:
            worker.show_log(f"the worker ended by itself, with {worker.process.returncode}")
        elif 0 < code < 128:
            worker.show_log("the chat failed")
        return code


class Worker:
    """A worker process whose stdout and log are files in `directory`; leaving the context ends it."""

    def __init__(self, model: str, directory: Path) -> None:
        self._out = directory / "out"
        self._log = directory / "log"
        with self._out.open("wb") as out, self._log.open("wb") as log:
            self.process = subprocess.Popen(  # noqa: S603
                [APIARY, "serve", "--listen", "127.0.0.1:0", "--model", model],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
                start_new_session=True,  # so that Ctrl-C at the terminal does not reach it
            )

    def wait_until_ready(self) -> str | None:
        """The address in the line that it prints when it is ready; None if that does not come."""
        end = time.monotonic() + START_SECONDS
        while self.process.poll() is None and time.monotonic() < end:
            if found := re.search(r"(127\.0\.0\.1:[1-9]\d*)\b.*\n", self._out.read_text(errors="replace")):
                return found[1]
            time.sleep(0.05)
        return None

    def show_log(self, why: str) -> None:
        """Say why, and show the last lines that it logged."""
        _say(f"{why}; the end of the worker's log:")
        sys.stderr.writelines(self._log.read_text(errors="replace").splitlines(keepends=True)[-LOG_LINES:])

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGINT, *ENDINGS):  # a second Ctrl-C must not leave the worker behind
            signal.signal(number, signal.SIG_IGN)
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _chat(address: str, arguments: tuple[str, ...]) -> int:
    chat = subprocess.Popen([APIARY, "chat", "--target", address, *arguments])  # noqa: S603
    try:
        code = chat.wait()
    finally:
        chat.terminate()
        chat.wait()
    return code if code >= 0 else 128 - code


def _say(text: str) -> None:
    sys.stderr.write(f"chat: {text}\n")


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
