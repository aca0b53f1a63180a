"""`apiary bench roofline`: the command; its parts have their own tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from apiary_bench.engine.workbench import Workbench
from apiary_bench.roofline import run as module
from apiary_bench.roofline.ceilings import Ceilings
from apiary_bench.roofline.part import Part
from apiary_bench.roofline.run import Plan
from apiary_client.cli.app import app
from tests import tiny

Invoke = Callable[..., Result]


@pytest.fixture
def invoke() -> Invoke:
    """Run the command in this process."""
    return lambda *arguments: CliRunner(env={"COLUMNS": "200"}).invoke(app, ["bench", "roofline", *arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model."""
    return str(tiny.save(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known ones: nothing is measured of the machine."""

    def measure(dtype: torch.dtype, *, int8: bool) -> Ceilings:
        return Ceilings(threads=1, copy=20e9, read=24e9, gemm=200e9, int8=500e9 if int8 else None)

    monkeypatch.setattr(Ceilings, "measure", measure)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--sessions", "1;2"], "--sessions takes whole numbers"),
        (["--json", "nowhere/at/all.json"], "nowhere/at is no directory"),
        (["--plots", "/dev/null/pictures"], "pictures cannot be written"),
        (["--model", "nobodys-model"], "no model 'nobodys-model'"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(arguments: list[str], why: str, invoke: Invoke) -> None:
    result = invoke(*arguments)
    assert result.exit_code in (1, 2)
    assert result.stdout == ""
    assert why in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "plan"),
    [("", Plan()), ("--sessions 2,3 --history 7 --steps 5", Plan((2, 3), 7, 5))],
)
def test_the_options_are_the_plan(
    arguments: str, plan: Plan, invoke: Invoke, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def run(bench: Workbench, plan: Plan, observe: object) -> None:
        asked.extend((bench.settings, plan))
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run", run)
    result = invoke(*f"{arguments} --model {model} --cache-dtype bfloat16 --threads 1".split())
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "stopped; nothing is reported\n")
    assert asked[0].cache_dtype == "bfloat16"
    assert asked[1] == plan


def test_tables_a_file_and_a_picture(ceilings: None, invoke: Invoke, model: str, tmp_path: Path) -> None:
    path, pictures = tmp_path / "roofline.json", tmp_path / "pictures"
    flags = "--sessions 1,2 --history 50 --steps 9 --threads 1 --weights int8"
    flags += " --policy h2o(heavy=20,recent=20,block=4)"
    files = ("--json", str(path), "--plots", str(pictures))
    result = invoke(*flags.split(), "--model", model, *files)
    assert result.exit_code == 0, result.stderr
    first, _, ceiling, *_ = result.stdout.splitlines()
    assert first == "roofline: 12 steps after 50 of history; the compaction period is 4"
    assert ceiling == "copy 20.0 GB/s (read alone 24.0), products 200 Gflop/s, of int8 500 Gop/s"
    assert all(part in result.stdout for part in Part)
    content = json.loads(path.read_text())
    assert content["environment"]["weights"] == "int8"
    for row, sessions in zip(content["rows"], (1, 2), strict=True):
        assert (row["sessions"], len(row["steps"])) == (sessions, 12)
        assert sum(row["parts"].values()) == pytest.approx(row["mean"])
        assert row["least"] == pytest.approx(sum(row["floor"].values()))
        assert f"{1000 * row['mean']:.2f}" in result.stdout
    assert [each.name for each in pictures.iterdir()] == ["roofline.png"]


def test_the_help_defines_what_is_reported(invoke: Invoke) -> None:
    text = " ".join(invoke("--help").stdout.split())
    for definition in (
        "Floor: the sum over a step's operations of max(bytes / copy bandwidth, arithmetic / peak of matrix",
        "with the engine's threads",
        "bytes read and written (as in STREAM)",
        "A step is one round of the engine's loop in which every session decodes one token.",
        "dispatch (the rest of the forward pass: small operations, packing, Python)",
    ):
        assert definition in text


@pytest.mark.model
def test_the_real_model(ceilings: None, invoke: Invoke, default_model: Path) -> None:
    flags = ["--model", str(default_model), "--threads", "1", "--policy", "streaming(window=60,block=4)"]
    result = invoke("--sessions", "2", "--history", "80", "--steps", "4", *flags)
    assert result.exit_code == 0, result.stderr
