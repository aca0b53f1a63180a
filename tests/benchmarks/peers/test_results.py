"""What is kept of runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from apiary_bench.errors import BenchError
from apiary_bench.peers.results import PointResult, Results, Run

from .fakes import IDENTITY, measures, run

ARGUMENTS: dict[str, Any] = {"peers": ["one", "two"], "model": "m", "repeats": 3, "quick": False, "seed": 0}


def test_rows_are_medians_in_the_order_of_the_peers() -> None:
    results = Results(
        ARGUMENTS,
        [
            run("two", 5.0),
            run("one", 1.0),
            run("one", 3.0, repeat=1),
            run("one", 2.0, repeat=2),
            run("one", 9.0, workload="other"),
        ],
    )
    rows = list(results.rows("small"))
    assert [(row.peer, row.repeats, row.measures and row.measures.rate) for row in rows] == [
        ("one", 3, 2.0),
        ("two", 1, 5.0),
    ]
    assert rows[0].identity == IDENTITY


def test_a_row_is_void_if_any_repeat_is() -> None:
    results = Results(ARGUMENTS, [run("one", 1.0), run("one", None, repeat=1), run("two", 1.0)])
    first, second = results.rows("small")
    assert (first.measures, first.void) == (None, "it broke")
    assert second.void is None


def test_points_are_in_growing_size() -> None:
    points = tuple(PointResult(f"{size}", size, measures(size)) for size in (1, 2, 16))
    results = Results(ARGUMENTS, [Run(peer, "small", 0, IDENTITY, points) for peer in ("two", "one")])
    assert [(row.size, row.peer) for row in results.rows("small")] == [
        (size, peer) for size in (1, 2, 16) for peer in ("one", "two")
    ]


def test_a_file_is_gone_on_with_but_for_void_runs(tmp_path: Path) -> None:
    path = tmp_path / "peers.json"
    half = Run(
        "two", "small", 0, None, (PointResult("a", 1, measures(1.0)), PointResult("b", 2, None, "late"))
    )
    written = Results(ARGUMENTS, [run("one", 1.5), run("one", None, repeat=1), half])
    path.write_text(json.dumps(written.content()))
    read = Results.read(path, ARGUMENTS)
    assert read.runs == [run("one", 1.5), half]
    assert read.done("one", "small", 0)
    assert not read.done("one", "small", 1)
    assert read.done("two", "small", 0)


def test_a_file_says_how_it_came_to_be() -> None:
    content = Results(ARGUMENTS, [run("one", 1.5)]).content()
    assert {"command", "date", "versions", "arguments", "runs"} == content.keys()
    assert content["runs"][0]["points"][0]["measures"]["rate"] == 1.5
    assert content["runs"][0]["identity"]["weights"] == "float32"


def test_other_peers_may_be_added_and_those_of_the_file_stay(tmp_path: Path) -> None:
    path = tmp_path / "peers.json"
    path.write_text(json.dumps(Results(ARGUMENTS, [run("two", 1.5)]).content()))
    read = Results.read(path, ARGUMENTS | {"peers": ["three"]})
    assert read.arguments["peers"] == ["one", "two", "three"]
    assert [row.peer for row in read.rows("small")] == ["two"]


def test_runs_with_other_arguments_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "peers.json"
    path.write_text(json.dumps(Results(ARGUMENTS).content()))
    with pytest.raises(BenchError, match="was made with another quick, seed: name another file"):
        Results.read(path, ARGUMENTS | {"quick": True, "seed": 1})


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"arguments": {}, "runs": [{}]}'])
def test_another_file_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(BenchError, match="was not written by `apiary bench peers`"):
        Results.read(path, ARGUMENTS)
