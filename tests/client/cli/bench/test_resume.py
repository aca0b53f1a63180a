"""`apiary bench resume`: the command; its parts have their own tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from apiary_bench.errors import VoidError
from apiary_bench.resume import run as module
from apiary_bench.resume.run import Plan
from tests.benchmarks.resume.test_run import FOUND
from tests.client.cli.bench.own import Invoke, asked_of, invoker, reports_nothing

Asked = tuple[Plan, dict[str, str], Path | None]


@pytest.fixture
def invoke() -> Invoke:
    return invoker("resume")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Asked | BaseException]:
    return asked_of(module, monkeypatch, FOUND)


def test_the_options_are_the_plan_and_the_worker_s_flags(
    invoke: Invoke, asked: list[Asked], tmp_path: Path
) -> None:
    plan = "--history 20 --input 3 --turns 4 --others 5 --repeats 2 --kill"
    worker = "--model m --policy buzz --weights int8 --backend cpu --threads 1"
    worker += " --cache-dtype bfloat16 --snapshot-bits 4"
    assert invoke(*plan.split(), *worker.split(), "--directory", str(tmp_path)).exit_code == 0
    assert invoke().exit_code == 0
    flags = dict(zip(worker.split()[::2], worker.split()[1::2], strict=True))
    assert asked == [
        (Plan(history=20, input=3, turns=4, others=5, repeats=2, kill=True), flags, tmp_path),
        (Plan(history=3000, input=32, turns=10, others=0, repeats=5, kill=False), {}, None),
    ]


def test_a_report_is_printed_and_written(invoke: Invoke, asked: list[Asked], tmp_path: Path) -> None:
    path = tmp_path / "resume.json"
    result = invoke("--json", str(path))
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("5 sessions of 3,000 tokens, turns of 32 in and 1 out; ")
    assert "1.50x" in result.stdout
    content = json.loads(path.read_text())
    assert content["summary"]["slowdown"] == pytest.approx(1.5)
    assert len(content["repeats"]) == 3


def test_void_is_told_in_one_line(invoke: Invoke, asked: list[Any], tmp_path: Path) -> None:
    asked.append(VoidError("a turn found nothing"))
    reports_nothing(invoke, tmp_path / "resume.json", 1, "error: a turn found nothing\n")


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        (["--json", "nowhere/at/all.json"], 1, "nowhere/at is no directory"),
        (["--history", "0"], 2, "Invalid value for '--history'"),
        (["--directory", "nowhere"], 2, "Invalid value for '--directory'"),
    ],
)
def test_what_cannot_be_is_told(invoke: Invoke, arguments: list[str], code: int, why: str) -> None:
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert why in result.stderr


def test_a_run_that_is_stopped_reports_nothing(invoke: Invoke, asked: list[Any], tmp_path: Path) -> None:
    asked.append(KeyboardInterrupt())
    reports_nothing(invoke, tmp_path / "resume.json", 130, "stopped; nothing is reported\n")
