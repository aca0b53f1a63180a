"""What forks cost, as tables and as JSON."""

from __future__ import annotations

import dataclasses
import json
from io import StringIO

from rich.console import Console
from rich.table import Table

from apiary_bench.fork import report
from apiary_bench.fork.run import Plan

from .test_run import FOUND, SLOT


def lines(table: Table) -> list[str]:
    out = StringIO()
    Console(file=out, width=200).print(table)
    return [" ".join(line.replace("│", " ").split()) for line in out.getvalue().splitlines()]


def test_both_kinds_of_forks() -> None:
    rows = lines(report.forks(FOUND))
    assert "fork 9.0 7.0 100.0 3 1.0" in rows
    assert "beyond the budget 30.0 20.0 40.0 2 2.0" in rows


def test_a_kind_that_did_not_come_has_no_row() -> None:
    rows = lines(report.forks(dataclasses.replace(FOUND, forks=FOUND.forks[:3])))
    assert "fork 9.0 7.0 100.0 3 1.0" in rows
    assert not any("beyond" in row for row in rows)


def test_a_range_of_bytes() -> None:
    uneven = [*FOUND.forks[:4], dataclasses.replace(FOUND.forks[4], copied_bytes=SLOT)]
    rows = lines(report.forks(dataclasses.replace(FOUND, forks=uneven)))
    assert "beyond the budget 30.0 20.0 40.0 2 1.0 to 2.0" in rows


def test_answers() -> None:
    rows = lines(report.answers(Plan(concurrency=5), FOUND))
    assert "next turns, 5 at a time 400.0 100.0 1300.0 3,000 none" in rows


def test_sessions() -> None:
    assert lines(report.sessions(Plan(output=4), FOUND)) == [
        "after the last fork 2 parked, 4 resident",
        "after the last answer 2 parked, 3 resident, 1 stored",
        "copied in all 7 MiB",
        "answered, all alike 6 sessions, 4 tokens each",
    ]


def test_the_heading() -> None:
    assert report.heading(Plan(forks=5, holds=4), FOUND).splitlines() == [
        "5 forks of a session of 3,000 tokens, one after the other, under a budget that holds 4",
        "fake, buzz; weights float32, cache bfloat16, budget 1,024 MiB",
    ]


def test_the_document_has_all_of_it() -> None:
    content = json.loads(json.dumps(report.document(Plan(forks=5), {"--weights": "int8"}, FOUND)))
    assert content["arguments"]["forks"] == 5
    assert content["environment"]["flags"] == {"--weights": "int8"}
    assert content["environment"]["model"]["name"] == "models/fake"
    assert content["summary"] == {
        "fork": FOUND.fork,
        "beyond": FOUND.beyond,
        "first": FOUND.first,
        "copied_bytes": 7 * SLOT,
        "made": {"resident": 4, "parked": 2},
        "answered": {"resident": 3, "parked": 2, "stored": 1},
    }
    assert content["forks"][3] == {"seconds": 0.02, "displaced": 1, "copied_bytes": 2 * SLOT}
    assert content["firsts"][0] == {"seconds": 0.1, "cached_tokens": 3000, "rebuild_reason": None}
