"""Results as JSON, there and back."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apiary_bench import document
from apiary_bench.errors import BenchError
from apiary_bench.quality import record
from apiary_bench.quality.report import sections
from apiary_bench.quality.settings import Settings
from tests.benchmarks.quality.samples import sample

SCORES = {
    "full": [{"kl": 0.0, "agreement": 1.0}] * 2,
    "h2o": [{"kl": 0.25, "agreement": 0.5}, {"kl": 0.75, "agreement": 1.0}],
}
SAMPLE = sample("fidelity", SCORES)


@pytest.fixture
def content() -> dict[str, Any]:
    settings = Settings(data=Path("data"), tasks=("fidelity",), policies=("h2o",), model="tiny")
    return json.loads(json.dumps(record.document(settings, sections([SAMPLE]))))  # type: ignore[no-any-return]


def test_what_programs_read(content: dict[str, Any]) -> None:
    (task,) = content["tasks"]
    assert (task["task"], task["budget"], task["documents"]) == ("fidelity", {"entries": 90}, 2)
    assert task["rivals"] == {"kl": "h2o", "agreement": "h2o"}
    full, h2o = task["policies"]
    assert (full["label"], h2o["label"]) == ("full", "h2o")
    assert h2o["scores"]["kl"]["value"] == h2o["baseline"]["kl"]["value"] == 0.5
    assert (h2o["deviation"], h2o["worst_deviation"], h2o["matched"]) == (0, 0, True)
    assert h2o["slot_bytes"] == 3_000_000
    assert h2o["policies"] == {"smallest": "h2o(number=0,", "largest": "h2o(number=1,"}
    assert full["others"] == {"kl": "h2o", "agreement": "h2o"}


def test_the_command_can_be_given_to_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["bench", "quality", "--data", "my data", "--policies", "h2o,buzz(window=300)"]
    monkeypatch.setattr(sys, "argv", ["/bin/apiary", *arguments])
    command = record.document(Settings(data=Path("my data")), [])["command"]
    assert shlex.split(command) == ["apiary", *arguments]


def test_what_was_written_is_read(content: dict[str, Any], tmp_path: Path) -> None:
    document.write(tmp_path / "a.json", content)
    assert record.read(tmp_path / "a.json") == [SAMPLE]


def test_results_of_a_version_that_knew_less(content: dict[str, Any], tmp_path: Path) -> None:
    for row in content["tasks"][0]["policies"]:
        for new in ("slot_bytes", "worst_deviation", "other", "others", "relative"):
            del row[new]
        for outcome in row["outcomes"]:
            del outcome["scores"]["agreement"]
    document.write(tmp_path / "a.json", content)
    (found,) = record.read(tmp_path / "a.json")
    assert found.slot_bytes == {"full": None, "h2o": None}
    (section,) = sections([found])
    assert section.rows[1].worst_deviation == 0
    assert set(section.rows[1].scores) == {"kl"}


def without_outcomes(task: dict[str, Any]) -> None:
    task["policies"][1]["outcomes"].pop()


def without_full(task: dict[str, Any]) -> None:
    del task["policies"][0]


def without_a_score(task: dict[str, Any]) -> None:
    task["policies"][1]["outcomes"][1]["scores"] = {}


def of_a_poem(task: dict[str, Any]) -> None:
    task["task"] = "poetry"


@pytest.mark.parametrize("spoil", [without_outcomes, without_full, without_a_score, of_a_poem])
def test_what_holds_no_results_is_refused(
    spoil: Callable[[dict[str, Any]], None], content: dict[str, Any], tmp_path: Path
) -> None:
    spoil(content["tasks"][0])
    document.write(tmp_path / "a.json", content)
    with pytest.raises(BenchError, match=r"a\.json has no results of"):
        record.read(tmp_path / "a.json")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"settings": {}, "tasks": [{}]}', "\xff"])
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text, encoding="latin-1")
    with pytest.raises(BenchError, match=r"a\.json has no results of"):
        record.read(tmp_path / "a.json")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"a\.json cannot be read"):
        record.read(tmp_path / "a.json")
