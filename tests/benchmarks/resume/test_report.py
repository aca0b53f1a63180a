"""What restarts cost, as tables and as JSON."""

from __future__ import annotations

import json
from io import StringIO

import pytest
from rich.console import Console
from rich.table import Table

from apiary_bench.resume import report
from apiary_bench.resume.run import Plan

from .test_run import FOUND


def lines(table: Table) -> list[list[str]]:
    out = StringIO()
    Console(file=out, width=200).print(table)
    return [line.replace("│", " ").split() for line in out.getvalue().splitlines()]


def test_first_tokens_and_what_they_found() -> None:
    rows = lines(report.first_tokens(FOUND))
    assert ["warm", "200.0", "100.0", "300.0", "3,010", "to", "3,030", "none"] in rows
    assert ["after", "the", "ready", "line", "300.0", "250.0", "9000.0", "3,000", "none"] in rows
    assert [
        "after",
        "it,",
        "without",
        "the",
        "snapshot",
        "5000.0",
        "5000.0",
        "5000.0",
        "0",
        "restarted",
    ] in rows


def test_ratios() -> None:
    rows = lines(report.ratios(FOUND))
    assert ["after", "the", "ready", "line", "/", "warm", "1.50x"] in rows
    assert ["without", "the", "snapshot", "/", "with", "it", "16.7x"] in rows
    assert ["process", "start", "to", "ready", "line", "6.00", "s"] in rows
    assert ["snapshot", "3.0", "MiB"] in rows


@pytest.mark.parametrize(
    ("plan", "first"),
    [
        (Plan(), "5 sessions of 3,000 tokens, turns of 32 in and 1 out; workers end by SIGTERM"),
        (
            Plan(kill=True, others=8, repeats=1),
            "1 sessions of 3,000 tokens beside 8 others, turns of 32 in and 1 out; workers end by SIGKILL",
        ),
    ],
)
def test_the_heading(plan: Plan, first: str) -> None:
    assert report.heading(plan, FOUND).splitlines() == [
        first,
        "fake, buzz; weights float32, cache bfloat16, budget 1,024 MiB",
    ]


def test_the_document_has_all_of_it() -> None:
    content = json.loads(json.dumps(report.document(Plan(kill=True), {"--weights": "int8"}, FOUND)))
    assert content["arguments"]["kill"] is True
    assert content["environment"]["flags"] == {"--weights": "int8"}
    assert content["environment"]["model"]["name"] == "models/fake"
    assert content["summary"] == {
        "warm": FOUND.warm,
        "resumed": FOUND.resumed,
        "recomputed": FOUND.recomputed,
        "slowdown": FOUND.slowdown,
        "gain": FOUND.gain,
        "ready": FOUND.ready,
        "snapshot_bytes": 3 * 2**20,
    }
    assert content["repeats"][0]["recomputed"] == {
        "seconds": 5.0,
        "cached_tokens": 0,
        "rebuild_reason": "restarted",
    }
