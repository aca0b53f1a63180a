"""`apiary bench peers`: the command. No engine is installed, and none runs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from apiary_bench.peers import registry
from apiary_client.cli.app import app
from tests import tiny
from tests.benchmarks.peers.fakes import FakeEngine, FakePeer

Invoke = Callable[..., Result]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's directory."""
    return tiny.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def invoke(model: Path, tmp_path: Path) -> Invoke:
    """Run the command in this process."""
    common = ("bench", "peers", "--model", str(model), "--directory", str(tmp_path / "peers"))
    return lambda *arguments: CliRunner(env={"COLUMNS": "250"}).invoke(app, [*common, *arguments])


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakePeer]:
    """Has every engine be a fake one, and keeps them by name."""
    found = {name: FakePeer(name) for name in registry.names()}

    def fake(chosen: Sequence[str], **_: Any) -> list[FakePeer]:
        return [found[name] for name in chosen]

    monkeypatch.setattr(registry, "peers", fake)
    return found


QUICK = ("--quick", "--repeats", "1", "--workload", "turns,prefill")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--workload", "sprint"], "no workload sprint: choose among decode, turns, prefill"),
        (["--peers", "gpt5"], "no engine gpt5: choose among apiary-fp32"),
        (["--json", "nowhere/peers.json"], "nowhere/peers.json cannot be written"),
        (["--model", "nobodys-model", "--peers", "vllm"], "no model 'nobodys-model'"),
    ],
)
def test_what_makes_no_sense_is_told_in_one_line(arguments: list[str], why: str, invoke: Invoke) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert why in result.stderr
    assert result.stderr.count("\n") == 1


def test_engines_are_measured_and_shown_in_one_table(
    peers: dict[str, FakePeer], invoke: Invoke, tmp_path: Path
) -> None:
    peers["vllm"].error = "no wheel for this machine"
    path, pictures = tmp_path / "peers.json", tmp_path / "pictures"
    result = invoke(
        *QUICK,
        "--peers",
        "apiary-fp32,vllm",
        "--peers",
        "llama.cpp",
        "--json",
        str(path),
        "--plots",
        str(pictures),
    )
    assert result.exit_code == 0, result.stderr
    assert "no wheel for this machine" in result.stdout
    assert "x llama.cpp" in result.stdout
    assert "apiary-fp32 1.2: two threads" in result.stderr
    assert [path.name for path in pictures.iterdir()] == ["peers.png"]
    content = json.loads(path.read_text())
    assert content["arguments"]["peers"] == ["apiary-fp32", "vllm", "llama.cpp"]
    assert [(run["workload"], run["peer"]) for run in content["runs"]] == [
        (workload, peer) for workload in ("turns", "prefill") for peer in ("apiary-fp32", "vllm", "llama.cpp")
    ]
    assert all(run["identity"] is None for run in content["runs"] if run["peer"] == "vllm")
    assert peers["transformers"].started == []


def test_by_default_it_is_all_but_growth_on_the_default_engines(
    peers: dict[str, FakePeer], invoke: Invoke
) -> None:
    result = invoke("--quick", "--repeats", "2")
    assert result.exit_code == 0, result.stderr
    for name, peer in peers.items():
        expected = ["decode", "turns", "prefill"] * 2 if name in registry.DEFAULT else []
        assert peer.started == expected


def test_markdown_is_printed_alone(peers: dict[str, FakePeer], invoke: Invoke) -> None:
    result = invoke(*QUICK, "--peers", "vllm", "--markdown")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("| workload | engine |")
    assert len(lines) == 2 + 1 + 2
    assert all(line.startswith("| ") and line.endswith(" |") for line in lines)
    assert peers["vllm"].started == ["turns", "prefill"]


def test_a_run_that_was_stopped_goes_on_with_resume(
    peers: dict[str, FakePeer], invoke: Invoke, tmp_path: Path
) -> None:
    path = tmp_path / "peers.json"
    asked = (*QUICK, "--peers", "vllm,llama.cpp", "--json", str(path))
    peers["llama.cpp"].engine = FakeEngine(short=(0,))
    assert invoke(*asked).exit_code == 0
    for peer in peers.values():
        peer.started.clear()
    result = invoke(*asked, "--resume")
    assert result.exit_code == 0, result.stderr
    assert peers["vllm"].started == []
    assert peers["llama.cpp"].started == ["turns"]  # the void one
    assert len(json.loads(path.read_text())["runs"]) == 4
    assert "the history" not in result.stdout


def test_without_resume_all_is_measured_anew(
    peers: dict[str, FakePeer], invoke: Invoke, tmp_path: Path
) -> None:
    asked = (*QUICK, "--peers", "vllm", "--json", str(tmp_path / "peers.json"))
    for _ in range(2):
        assert invoke(*asked).exit_code == 0
    assert peers["vllm"].started == ["turns", "prefill"] * 2


def test_resume_needs_a_file(peers: dict[str, FakePeer], invoke: Invoke) -> None:
    result = invoke(*QUICK, "--peers", "vllm", "--resume")
    assert result.exit_code == 2
    assert "--resume goes on with a file: name it with --json" in result.stderr
    assert peers["vllm"].started == []


def test_runs_of_other_sizes_are_not_mixed(
    peers: dict[str, FakePeer], invoke: Invoke, tmp_path: Path
) -> None:
    path = str(tmp_path / "peers.json")
    assert invoke(*QUICK, "--peers", "vllm", "--json", path).exit_code == 0
    result = invoke(*QUICK, "--peers", "vllm", "--json", path, "--resume", "--seed", "1")
    assert result.exit_code == 1
    assert "was made with another seed" in result.stderr
    assert peers["vllm"].started == ["turns", "prefill"]


def test_what_is_stopped_says_how_to_go_on(
    peers: dict[str, FakePeer], invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "peers.json"

    def stop(self: FakeEngine) -> int:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        return 0

    monkeypatch.setattr(FakeEngine, "memory", stop)
    result = invoke(*QUICK, "--peers", "vllm", "--json", str(path))
    assert result.exit_code == 130
    assert f"finished runs are in {path}: the same command with --resume goes on" in " ".join(
        result.stderr.split()
    )
    assert peers["vllm"].alone == []


def test_the_help_says_what_is_measured(invoke: Invoke) -> None:
    text = " ".join(invoke("--help").stdout.split())
    for definition in (
        "decode: 16 sessions of 600 tokens; tokens/s while all decode.",
        "A row is void if any of its turns failed or was cut short.",
        "vllm-server and llama.cpp over HTTP",
    ):
        assert definition in text
