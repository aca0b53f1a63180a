"""`apiary bench quality`: the command; its parts have their own tests."""

from __future__ import annotations

import builtins
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from apiary_bench.quality.tasks import TASKS
from apiary_client.cli.app import app

Invoke = Callable[..., Result]
WORDS = [
    "river",
    "stone",
    "lamp",
    "garden",
    "winter",
    "letter",
    "engine",
    "basket",
    "market",
    "silver",
    "road",
]


@pytest.fixture
def invoke() -> Invoke:
    """Run the command in this process."""
    return lambda *arguments: CliRunner(env={"COLUMNS": "250"}).invoke(app, ["bench", "quality", *arguments])


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--task", "poetry"], "unknown task 'poetry'; known are wikitext"),
        (["--policies", "h2o,buzz(window=3"], "parentheses do not match"),
        (["--entries", "many"], "--entries takes whole numbers"),
        (["--ratio", "x"], "--ratio takes numbers"),
        (["--match", "weight"], "--match takes bytes or entries"),
        (["--baseline", "buzz", "--policies", "h2o"], "none of the policies"),
        (["--model", "nobodys-model"], "no model 'nobodys-model'"),
    ],
)
def test_what_makes_no_sense_is_told_in_one_line(arguments: list[str], why: str, invoke: Invoke) -> None:
    result = invoke("--data", "nowhere", *arguments)
    assert result.exit_code in (1, 2)
    assert result.stdout == ""
    assert why in result.stderr
    assert result.stderr.count("\n") == 1


def test_where_pictures_cannot_be_written_nothing_is_measured(tmp_path: Path, invoke: Invoke) -> None:
    (tmp_path / "file").write_text("")
    result = invoke("--data", "nowhere", "--plots", str(tmp_path / "file" / "pictures"))
    assert result.exit_code == 1
    assert "pictures cannot be written" in result.stderr


def test_a_missing_library_is_told_with_the_extra(monkeypatch: pytest.MonkeyPatch, invoke: Invoke) -> None:
    load = builtins.__import__

    def without(name: str, *arguments: Any, **more: Any) -> Any:
        if name == "apiary_bench.quality":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return load(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    result = invoke("--data", "nowhere")
    assert result.exit_code == 1
    assert result.stderr == (
        "error: the benchmark's library matplotlib is missing: pip install 'apiary[bench]'\n"
    )


def test_finished_runs_make_their_tables_again(tmp_path: Path) -> None:
    score = {"kl": 0.25, "agreement": 0.5}
    outcome = {"policy": "h2o", "bound": 9, "entries": 8, "bytes": 7.0, "peak_bytes": 9, "target_bytes": None}
    settings = {"model": "tiny", "match": None, "seed": 0, "baseline": "full"}
    for name in ("h2o", "buzz"):
        rows = [{"label": each, "outcomes": [outcome | {"scores": score}]} for each in ("full", name)]
        task = {"task": "fidelity", "budget": {"entries": 9}, "documents": 1, "policies": rows}
        (tmp_path / f"{name}.json").write_text(json.dumps({"settings": settings, "tasks": [task]}))
    runner = CliRunner(env={"COLUMNS": "250"})
    files = [str(tmp_path / "h2o.json"), str(tmp_path / "buzz.json")]
    table = runner.invoke(app, ["bench", "report", *files])
    assert table.exit_code == 0, table.stderr
    page = runner.invoke(app, ["bench", "report", *files, "--markdown"])
    assert page.stdout.startswith("### fidelity (9 entries), 1 documents\n\n| policy |")
    for shown in (table.stdout, page.stdout):
        lines = [line for line in shown.splitlines() if "0.2500" in line]
        assert [re.findall(r"\w+", line)[0] for line in lines] == ["full", "h2o", "buzz"]
    one = runner.invoke(app, ["bench", "report", *files, "--policies", "buzz"]).stdout
    assert "buzz" in one
    assert "h2o" not in one
    unknown = runner.invoke(app, ["bench", "report", *files, "--policies", "elastic"])
    assert (unknown.exit_code, unknown.stdout) == (1, "")
    assert "elastic did not run; those that did: full, h2o, buzz" in unknown.stderr
    missing = runner.invoke(app, ["bench", "report", str(tmp_path / "none.json")])
    assert (missing.exit_code, missing.stdout) == (1, "")
    assert "none.json cannot be read" in missing.stderr


@pytest.mark.model
def test_all_tasks_on_the_real_model(
    invoke: Invoke, default_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smaller: dict[str, dict[str, Any]] = {
        "wikitext": {"length": 448, "warmup": 200},
        "xsum": {"output": 12},
        "cnn_dm": {"output": 12},
        "qa10": {"output": 8},
        "fidelity": {"output": 8},
        "recall": {"output": 4, "first_words": 60, "later_words": 5},
    }
    for name, changes in smaller.items():
        monkeypatch.setitem(TASKS, name, dataclasses.replace(TASKS[name], **changes))
    text = " ".join(WORDS[(i * i + i // 7) % len(WORDS)] for i in range(600))
    article = " ".join(text.split()[:150])
    documents = [{"title": f"Title {i}", "text": " ".join(WORDS[i:])} for i in range(10)]
    files: dict[str, dict[str, Any]] = {
        "xsum.jsonl": {"document": article, "summary": "a river"},
        "cnn_dm.jsonl": {"article": article, "highlights": "a lamp"},
        "qa10.jsonl": {"question": "where is it", "answers": ["road"], "documents": documents},
    }
    for name, row in files.items():
        (tmp_path / name).write_text(json.dumps(row))
    (tmp_path / "wikitext2.txt").write_text(text)
    arguments = ("--data", str(tmp_path), "--limit", "1", "--policies", "streaming(window=60,block=8)")
    out, pictures = tmp_path / "a.json", tmp_path / "pictures"
    result = invoke(
        *arguments, "--entries", "60", "--threads", "1", "--json", str(out), "--plots", str(pictures)
    )
    assert result.exit_code == 0, result.stderr
    tasks = json.loads(out.read_text())["tasks"]
    assert [task["task"] for task in tasks] == ["wikitext", "xsum", "cnn_dm", "qa10", "fidelity", "recall"]
    assert len(list(pictures.iterdir())) == 7
    for task in tasks:
        assert task["documents"] == 1
        assert [policy["label"] for policy in task["policies"]] == ["full", "streaming(window=60,block=8)"]
        assert f"{task['task']} (" in result.stdout
    again = invoke(*arguments, "--entries", "60", "--threads", "1", "--json", str(out))
    assert again.stdout == result.stdout
    assert json.loads(out.read_text())["tasks"] == tasks
