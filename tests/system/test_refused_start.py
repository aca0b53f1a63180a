"""A worker that cannot start says why in one line, and ends with a code that tells whose fault it was."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from .worker import APIARY, environment

SETTINGS, MACHINE = 2, 1


def _refusal(arguments: Sequence[str], code: int) -> str:
    """Start in vain; the last line on stderr. Nothing but the announcement of loading may stand before it."""
    done = subprocess.run(
        [APIARY, "serve", *arguments],
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    *before, last = done.stderr.splitlines()
    assert all(line.startswith("apiary: loading ") for line in before), done.stderr
    assert len(before) <= 1
    return last


def test_port_in_use(tiny_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        said = _refusal(["--model", str(tiny_model), "--listen", address], MACHINE)
    assert said == f"apiary: cannot listen on {address}: Address already in use"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--cache-budget", "lots"], "'lots' is not a size"),
        (["--listen", "0.0.0.0:0"], "can be reached by others"),
        (["--max-running", "0"], "--max-running: "),
        (["--policy"], "requires an argument"),
    ],
)
def test_bad_flag(flags: list[str], said: str) -> None:
    assert (
        said
        in subprocess.run(
            [APIARY, "serve", *flags], env=environment(), capture_output=True, text=True, timeout=60
        ).stderr
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (lambda tiny: ["--model", "/no/such/model"], "/no/such/model"),
        (lambda tiny: ["--model", str(tiny), "--policy", "buzz(stride=2)"], "stride"),
        (lambda tiny: ["--model", str(tiny), "--cache-budget", "100KiB"], "102,400 bytes is too small"),
        (
            lambda tiny: ["--model", str(tiny), "--weights", "int8", "--backend", "reference"],
            "the backend reference keeps weights as they are",
        ),
    ],
    ids=["model", "policy", "budget", "weights"],
)
def test_what_cannot_be_served(tiny_model: Path, flags: Callable[[Path], list[str]], said: str) -> None:
    line = _refusal(["--listen", "127.0.0.1:0", *flags(tiny_model)], SETTINGS)
    assert line.startswith("apiary: ")
    assert said in line
