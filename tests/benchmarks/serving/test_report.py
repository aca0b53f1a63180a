"""A run as tables and as JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from apiary_bench.serving import report
from apiary_bench.serving.generator import Run
from apiary_bench.serving.record import Outcome, Record
from apiary_bench.serving.statistics import summarise
from apiary_bench.serving.workload import Objectives, Workload
from tests.benchmarks.serving.fake_client import MODEL, capacity, usage

GOOD = Record(
    session=1,
    turn=0,
    sent=0.5,
    ended=1.5,
    arrivals=(0.5, 1.0, 1.5),
    arrival_tokens=(1, 1, 2),
    input=8,
    asked=4,
    outcome=Outcome.COMPLETED,
    usage=usage(8, 300, 4),
)
BAD = Record(
    session=0,
    turn=0,
    sent=0.0,
    ended=0.25,
    input=8,
    asked=4,
    outcome=Outcome.FAILED,
    reason="QUEUE_FULL",
    message="too many wait",
)
WORKLOAD = Workload(
    sessions=2, turns=1, history=300, input=8, output=4, policy="buzz", objectives=Objectives(0.6)
)


def run(*records: Record) -> Run:
    return Run(
        model=MODEL,
        policy="buzz(window=9)",
        before=capacity(),
        after=capacity(7),
        records=records,
        undeleted=(),
    )


def shown(table: Table) -> list[list[str]]:
    """The words of each line."""
    console = Console(file=StringIO(), width=200)
    with console.capture() as capture:
        console.print(table)
    return [line.split() for line in capture.get().replace("│", " ").replace("┃", " ").splitlines()]


def test_the_tables_of_a_run() -> None:
    summary = summarise([GOOD], WORKLOAD.objectives)
    assert report.heading(WORKLOAD, run(GOOD)) == (
        "2 sessions x 1 turns, 8 in, 4 out, after 300 of history; closed\n"
        "fake, buzz(window=9); weights float32, cache bfloat16, budget 1,024 MiB"
    )
    rows = shown(report.latencies(summary))
    assert ["time", "to", "first", "token", "(TTFT)", *["500.0"] * 5] in rows
    assert ["time", "per", "output", "token", "(TPOT)", *["333.3"] * 5] in rows
    assert ["inter-token", "latency", "(ITL)", *["500.0"] * 5] in rows
    assert ["end-to-end", "latency", "(E2EL)", *["1500.0"] * 5] in rows
    assert not any("delay" in row for row in rows)
    lines = [" ".join(row) for row in shown(report.totals(WORKLOAD, summary))]
    assert lines == [
        "turns 1 completed",
        "measured 1.50 s",
        "turns/s 0.667",
        "output tokens/s 2.7",
        "all tokens/s 8.0",
        "goodput 0.667 turns/s (1 kept TTFT 600 ms)",
        "tokens not re-prefilled 300, beside 8 of input",
        "tokens per message 1.33",
    ]


def test_a_void_run_says_so_with_the_reasons() -> None:
    short = replace(GOOD, outcome=Outcome.CUT_SHORT)
    summary = summarise([BAD, short, BAD, GOOD], Objectives())
    lines = [" ".join(row) for row in shown(report.totals(Workload(), summary))]
    assert lines[0] == "turns 1 completed, 1 cut short, 2 failed (QUEUE_FULL 2): VOID"
    assert "goodput no objectives were set" in lines


def test_without_a_completed_turn_there_are_no_latencies() -> None:
    summary = summarise([BAD], Objectives())
    assert report.latencies(summary).row_count == 0
    assert ["tokens", "per", "message", "none", "came"] in shown(report.totals(Workload(), summary))


def test_an_open_loop_shows_its_rate_and_delays() -> None:
    workload = Workload(sessions=2, turns=1, rate=2.5)
    record = replace(GOOD, scheduled=0.25)
    assert "32 out; poisson at 2.5 turns/s\n" in report.heading(workload, run(record))
    assert ["start", "delay", *["250.0"] * 5] in shown(report.latencies(summarise([record], Objectives())))


@pytest.fixture
def content() -> dict[str, Any]:
    summary = summarise([BAD, GOOD], WORKLOAD.objectives)
    document = report.document(WORKLOAD, run(BAD, GOOD), summary)
    return json.loads(json.dumps(document, allow_nan=False))  # type: ignore[no-any-return]


def test_what_programs_read(content: dict[str, Any]) -> None:
    arguments, environment, summary = content["arguments"], content["environment"], content["summary"]
    assert (arguments["sessions"], arguments["history"], arguments["arrival"]) == (2, 300, "closed")
    assert arguments["objectives"] == {"ttft": 0.6, "tpot": None}
    assert environment["policy"] == "buzz(window=9)"
    assert environment["model"]["weight_dtype"] == "float32"
    assert environment["model"]["cache_dtype"] == "bfloat16"
    assert environment["capacity_before"]["budget_bytes"] == 2**30
    assert environment["capacity_after"]["used_bytes"] == 7
    assert (summary["void"], summary["good"], summary["reasons"]) == (True, 1, {"QUEUE_FULL": 1})
    assert summary["turns"] == {"completed": 1, "cancelled": 0, "cut_short": 0, "failed": 1}
    assert summary["ttft"]["p99"] == 0.5


def test_every_request_is_there_raw(content: dict[str, Any]) -> None:
    bad, good = content["requests"]
    assert (bad["outcome"], bad["reason"], bad["message"]) == ("failed", "QUEUE_FULL", "too many wait")
    assert (bad["ttft"], bad["arrivals"], bad["usage"]) == (None, [], None)
    assert (good["sent"], good["ttft"], good["ended"], good["tpot"]) == (0.5, 0.5, 1.5, pytest.approx(1 / 3))
    assert (good["arrivals"], good["arrival_tokens"], good["tokens"]) == ([0.5, 1.0, 1.5], [1, 1, 2], 4)
    assert good["usage"]["cached_tokens"] == 300
