"""What the tests of commands that start workers of their own have alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import pytest
from typer.testing import CliRunner, Result

from apiary_client.cli.app import app

Invoke: TypeAlias = Callable[..., Result]


def invoker(command: str) -> Invoke:
    """Runs a command of `apiary bench` in this process."""
    return lambda *arguments: CliRunner(env={"COLUMNS": "200"}).invoke(app, ["bench", command, *arguments])


def asked_of(module: ModuleType, monkeypatch: pytest.MonkeyPatch, found: Any) -> list[Any]:
    """What a module's `run`, which finds this, is asked for; an exception in it is raised instead."""
    asked: list[Any] = []

    async def run(plan: Any, flags: Mapping[str, str], observe: Any, directory: Path | None) -> Any:
        if asked and isinstance(asked[0], BaseException):
            raise asked[0]
        asked.append((plan, dict(flags), directory))
        return found

    monkeypatch.setattr(module, "run", run)
    return asked


def reports_nothing(invoke: Invoke, file: Path, code: int, why: str) -> None:
    """Check that a run ends with a line for people, and without a report."""
    result = invoke("--json", str(file))
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr == why
    assert list(file.parent.iterdir()) == []
