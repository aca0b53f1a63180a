"""The command's frame."""

from __future__ import annotations

import pytest

from ..conftest import Run

COMMANDS = [
    ["serve"],
    ["chat"],
    ["generate"],
    ["status"],
    ["sessions", "list"],
    ["sessions", "show"],
    ["sessions", "delete"],
    ["models", "pull"],
    ["models", "list"],
]


def test_the_version(apiary: Run) -> None:
    assert apiary("--version").stdout.startswith("apiary 0.")


def test_help_names_every_command(apiary: Run) -> None:
    said = apiary("--help").stdout
    assert all(f" {command[0]} " in said for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_shows_examples(apiary: Run, command: list[str]) -> None:
    done = apiary(*command, "--help")
    assert done.returncode == 0
    assert f"apiary {' '.join(command)}" in done.stdout.partition("Examples")[2]


def test_a_bad_option_is_a_usage_error(apiary: Run) -> None:
    done = apiary("chat", "--temperature", "11")
    assert done.returncode == 2
    assert "temperature" in done.stderr
    assert done.stdout == ""
