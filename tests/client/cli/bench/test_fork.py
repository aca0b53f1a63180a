"""`apiary bench fork`: the command; its parts have their own tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from apiary_bench.errors import VoidError
from apiary_bench.fork import run as module
from apiary_bench.fork.run import Plan
from tests.benchmarks.fork.test_run import FOUND
from tests.client.cli.bench.own import Invoke, asked_of, invoker, reports_nothing

Asked = tuple[Plan, dict[str, str], Path | None]


@pytest.fixture
def invoke() -> Invoke:
    return invoker("fork")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Asked | BaseException]:
    return asked_of(module, monkeypatch, FOUND)


def test_the_options_are_the_plan_and_the_worker_s_flags(
    invoke: Invoke, asked: list[Asked], tmp_path: Path
) -> None:
    plan = "--history 20 --forks 4 --holds 3 --input 5 --output 2 --concurrency 6"
    worker = "--model m --policy buzz --weights int8 --backend cpu --cache-dtype bfloat16 --threads 1"
    assert invoke(*plan.split(), *worker.split(), "--directory", str(tmp_path)).exit_code == 0
    assert invoke().exit_code == 0
    flags = dict(zip(worker.split()[::2], worker.split()[1::2], strict=True))
    assert asked == [
        (Plan(history=20, forks=4, holds=3, input=5, output=2, concurrency=6), flags, tmp_path),
        (Plan(history=3000, forks=100, holds=20, input=32, output=8, concurrency=16), {}, None),
    ]


def test_a_report_is_printed_and_written(invoke: Invoke, asked: list[Asked], tmp_path: Path) -> None:
    path = tmp_path / "fork.json"
    result = invoke("--json", str(path))
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("100 forks of a session of 3,000 tokens, one after the other, ")
    for row in ("beyond the budget", "first token, milliseconds", "answered, all alike"):
        assert row in result.stdout
    content = json.loads(path.read_text())
    assert content["summary"]["fork"] == pytest.approx(0.009)
    assert len(content["forks"]) == 5


def test_void_is_told_in_one_line(invoke: Invoke, asked: list[Any], tmp_path: Path) -> None:
    asked.append(VoidError("a fork did not answer"))
    reports_nothing(invoke, tmp_path / "fork.json", 1, "error: a fork did not answer\n")


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        (["--json", "nowhere/at/all.json"], 1, "nowhere/at is no directory"),
        (["--forks", "0"], 2, "Invalid value for '--forks'"),
        (["--holds", "1"], 2, "Invalid value for '--holds'"),
        (["--directory", "nowhere"], 2, "Invalid value for '--directory'"),
    ],
)
def test_what_cannot_be_is_told(invoke: Invoke, arguments: list[str], code: int, why: str) -> None:
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert why in result.stderr


def test_a_run_that_is_stopped_reports_nothing(invoke: Invoke, asked: list[Any], tmp_path: Path) -> None:
    asked.append(KeyboardInterrupt())
    reports_nothing(invoke, tmp_path / "fork.json", 130, "stopped; nothing is reported\n")
