"""`apiary bench interference`: the command; its parts have their own tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from apiary_bench.serving import interference
from apiary_bench.serving.interference import Interference, Scene
from apiary_client import TLS, aio
from apiary_client.cli.app import app
from tests.benchmarks.serving.test_interference import FOUND

Invoke = Callable[..., Result]


@pytest.fixture
def invoke() -> Invoke:
    """Run the command in this process."""
    return lambda *arguments: CliRunner(env={"COLUMNS": "200"}).invoke(
        app, ["bench", "interference", *arguments]
    )


@pytest.fixture
def scenes(monkeypatch: pytest.MonkeyPatch) -> list[Scene | BaseException]:
    """What is asked for; an exception in it is raised instead."""
    asked: list[Scene | BaseException] = []

    async def run(scene: Scene, client: aio.Client, observe: Any) -> Interference:
        if asked and isinstance(asked[0], BaseException):
            raise asked[0]
        asked.append(scene)
        return FOUND

    monkeypatch.setattr(interference, "run", run)
    return asked


def test_the_options_are_the_scene(invoke: Invoke, scenes: list[Scene]) -> None:
    flags = "--streams 3 --history 20 --prompt 500 --quiet 9 --repeats 2 --policy buzz"
    assert invoke(*flags.split()).exit_code == 0
    assert invoke().exit_code == 0
    assert scenes == [
        Scene(streams=3, history=20, prompt=500, quiet=9, repeats=2, policy="buzz"),
        Scene(streams=15, history=600, prompt=4000, quiet=64, repeats=5),
    ]


def test_a_client_gets_the_connection_options(
    invoke: Invoke, scenes: list[Scene], clients: list[dict[str, Any]]
) -> None:
    assert invoke("--target", "localhost:7", "--tls", "--tenant", "bees").exit_code == 0
    assert clients == [{"target": "localhost:7", "tenant": "bees", "tls": TLS()}]


def test_a_report_is_printed_and_written(invoke: Invoke, scenes: list[Scene], tmp_path: Path) -> None:
    path = tmp_path / "interference.json"
    result = invoke("--json", str(path))
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("a prompt of 4000 tokens beside 15 streams with 600 of history\n")
    assert "2.00x" in result.stdout
    content = json.loads(path.read_text())
    assert content["summary"]["wait"] == pytest.approx(3.0)
    assert len(content["times"]) == 3


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--streams", "0"], "streams must be at least 1, not 0"),
        (["--quiet", "1"], "quiet must be at least 2"),
        (["--json", "nowhere/at/all.json"], "nowhere/at is no directory"),
        (["--target", "127.0.0.1:1"], "is a worker running at 127.0.0.1:1?"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(arguments: list[str], why: str, invoke: Invoke) -> None:
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert why in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_run_that_is_stopped_reports_nothing(
    invoke: Invoke, scenes: list[BaseException], tmp_path: Path
) -> None:
    scenes.append(KeyboardInterrupt())
    result = invoke("--json", str(tmp_path / "interference.json"))
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr == "stopped; nothing is reported\n"
    assert list(tmp_path.iterdir()) == []
