"""`apiary bench engine`: the commands; the experiments have their own tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from apiary_bench.engine import decode, prefill, turns, warm
from apiary_bench.engine.decode import Decode
from apiary_bench.engine.prefill import Prefill
from apiary_bench.engine.turns import Turns
from apiary_bench.engine.warm import Warm
from apiary_bench.engine.workbench import Workbench
from apiary_client.cli.app import app
from tests import tiny

Invoke = Callable[..., Result]
EXPERIMENTS = {"decode": decode, "turns": turns, "prefill": prefill, "warm": warm}


@pytest.fixture
def invoke() -> Invoke:
    """Run the command in this process."""
    return lambda *arguments: CliRunner(env={"COLUMNS": "200"}).invoke(app, ["bench", "engine", *arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model."""
    return str(tiny.save(tmp_path_factory.mktemp("tiny")))


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--sessions", "many"], "--sessions takes whole numbers"),
        (["decode", "--sessions", "1,0"], "--sessions takes numbers of at least 1, each once"),
        (["prefill", "--prompt", "8,8"], "--prompt takes numbers of at least 1, each once"),
        (["--model", "nobodys-model"], "no model 'nobodys-model'"),
        (["turns", "--json", "nowhere/at/all.json"], "nowhere/at is no directory"),
        (["warm", "--cache-budget", "much"], "cache_budget: 'much' is not a size"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(arguments: list[str], why: str, invoke: Invoke) -> None:
    result = invoke(*arguments)
    assert result.exit_code in (1, 2)
    assert result.stdout == ""
    assert why in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "name", "plan"),
    [
        ("", "decode", Decode()),
        ("--sessions 1,64 --output 9", "decode", Decode(sessions=(1, 64), output=9)),
        (
            "decode --sessions 2 --history 5 --prompt 7 --output 8 --repeats 1",
            "decode",
            Decode((2,), 5, 7, 8, 1),
        ),
        ("turns", "turns", Turns()),
        (
            "turns --sessions 2 --history 9 --input 3 --output 4 --early 5 --late 60 --average 7 --repeats 1",
            "turns",
            Turns(2, 9, 3, 4, 5, 60, 7, 1),
        ),
        ("prefill", "prefill", Prefill()),
        ("prefill --prompt 5,6 --repeats 2", "prefill", Prefill((5, 6), 2)),
        ("warm", "warm", Warm()),
        ("warm --sessions 5 --history 6 --input 7 --pairs 8", "warm", Warm(5, 6, 7, 8)),
    ],
)
def test_the_options_are_the_plan(
    arguments: str,
    name: str,
    plan: object,
    invoke: Invoke,
    model: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []

    def run(bench: Workbench, plan: object, observe: object) -> None:
        asked.extend((bench.settings, plan))
        raise KeyboardInterrupt

    monkeypatch.setattr(EXPERIMENTS[name], "run", run)
    worker = f"--model {model} --threads 1 --weights int8 --step-tokens 99"
    result = invoke(*f"{arguments} {worker}".split())
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "stopped; nothing is reported\n")
    settings, found = asked
    assert found == plan
    assert (settings.weights, settings.step_tokens, settings.backend) == ("int8", 99, "auto")
    assert settings.cache_budget == 2**30


def test_a_report_is_printed_and_written(invoke: Invoke, model: str, tmp_path: Path) -> None:
    path = tmp_path / "decode.json"
    flags = "--sessions 1,2 --prompt 20 --output 40 --repeats 2 --threads 1 --policy streaming"
    result = invoke(*flags.split(), "--model", model, "--json", str(path))
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("decode: 20 in, 40 out; medians of 2\n")
    assert "streaming(sink=4,window=560); weights fp32, cache float32, 1 threads" in result.stdout
    content = json.loads(path.read_text())
    assert content["experiment"] == "decode"
    assert [row["sessions"] for row in content["result"]] == [1, 2]
    for row in content["result"]:
        assert f"{row['decode_throughput']:.1f}" in result.stdout


def test_help_names_the_experiments(invoke: Invoke) -> None:
    text = invoke("--help").stdout
    assert all(f" {name} " in text for name in EXPERIMENTS)
    assert "Without a command: decode." in text


@pytest.mark.parametrize(
    ("name", "definition"),
    [
        (
            "decode",
            "A step here is one in which every session computes one generated token, and nothing else",
        ),
        ("turns", "as many as make whole compaction periods"),
        ("prefill", "Seconds from a prompt to its first token"),
        ("warm", "To unpark a session, another one is parked; that is in its time."),
    ],
)
def test_the_help_defines_what_is_reported(name: str, definition: str, invoke: Invoke) -> None:
    text = " ".join(invoke(name, "--help").stdout.split())
    assert definition in text
    assert f"apiary bench engine {name}" in text.partition("Examples")[2]


@pytest.mark.model
def test_the_real_model(invoke: Invoke, default_model: Path) -> None:
    flags = ["--model", str(default_model), "--repeats", "1", "--threads", "1"]
    result = invoke("--sessions", "2", "--prompt", "24", "--output", "6", *flags)
    assert result.exit_code == 0, result.stderr
    assert "buzz2" in result.stdout
