"""Tables and JSON of what was measured."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from apiary_bench.engine import report
from apiary_bench.engine.decode import Decode, Sample
from apiary_bench.engine.decode import Row as DecodeRow
from apiary_bench.engine.prefill import Prefill
from apiary_bench.engine.prefill import Row as PrefillRow
from apiary_bench.engine.turns import Result as TurnsResult
from apiary_bench.engine.turns import Sample as TurnsSample
from apiary_bench.engine.turns import Turns
from apiary_bench.engine.warm import Result as WarmResult
from apiary_bench.engine.warm import Warm
from tests.benchmarks.engine.small import POLICY, workbench

DECODE = DecodeRow(
    sessions=16,
    prefill_throughput=450.25,
    decode_throughput=111.11,
    output_throughput=101.5,
    step_p50=0.144,
    step_p99=0.2504,
    budget_bytes=2**30,
    peak_bytes=3 * 2**28,
    samples=[
        Sample(prefill_throughput=450.25, decode_throughput=111.11, output_throughput=101.5, steps=[0.144])
    ],
)
TURNS = TurnsResult(
    history=1128,
    period=2,
    averaged=4,
    samples=[TurnsSample([0.05] * 4, [0.0525] * 4)],
    early=0.05,
    late=0.0525,
    ratio=1.0501,
)
PREFILL = [
    PrefillRow(tokens=8000, seconds=16.5, throughput=484.8, doubling=None, samples=[16.5]),
    PrefillRow(tokens=16000, seconds=34.0, throughput=470.6, doubling=2.0606, samples=[34.0]),
]
WARM = WarmResult(
    slot_bytes=29 * 2**20,
    resident=28,
    parked=172,
    used_bytes=2**30,
    parked_bytes=5 * 2**30,
    held_bytes=6 * 2**30,
    full_bytes=25 * 2**30,
    rss_before_bytes=2**30,
    rss_bytes=7 * 2**30,
    resident_ttft=[0.1, 0.3, 0.2],
    parked_ttft=[0.2, 0.3, 0.22],
    ratio=1.1,
    worst=1.5,
)


def lines(table: Table) -> list[str]:
    """The words of each line of a table."""
    console = Console(file=StringIO(), width=200)
    with console.capture() as capture:
        console.print(table)
    return [" ".join(line.split()) for line in capture.get().replace("│", " ").replace("┃", " ").splitlines()]


def test_decode() -> None:
    asked, table = report.decode(Decode(history=10), [DECODE])
    assert asked == "decode: 600 in, 64 out, after 10 of history; medians of 3"
    assert "16 450.2 111.1 144.0 250.4 101.5 768 1,024" in lines(table)


def test_turns() -> None:
    asked, table = report.turns(Turns(repeats=1), TURNS)
    assert asked == (
        "turns: 1 sessions, 8 in, 24 out, after 1128 of history; measured once\n"
        "a compaction period is 64 tokens (2 turns); averages over 2 of them"
    )
    assert {"3 to 6 50.00", "50 to 53 52.50", "late / early 1.050x"} <= set(lines(table))


def test_prefill() -> None:
    asked, table = report.prefill(Prefill(), PREFILL)
    assert asked == "prefill: one prompt at a time; medians of 3"
    assert {"8,000 16.500 484.8 -", "16,000 34.000 470.6 2.06x"} <= set(lines(table))


def test_warm() -> None:
    asked, table = report.warm(Warm(), WARM)
    assert asked == "warm: 200 sessions x 3000 of history; next turns of 32 tokens, 20 pairs"
    assert lines(table) == [
        "resident 28 sessions",
        "parked 172 sessions",
        "a slot, resident or parked 29.0 MiB",
        "cache budget in use 1.00 GiB",
        "parked caches 5.00 GiB",
        "both 6.00 GiB",
        "full caches would take 25.00 GiB",
        "process (RSS) 7.00 GiB; before the sessions 1.00 GiB",
        "first token, resident 200 ms (median; 100 to 300)",
        "first token, parked 220 ms (median; 200 to 300)",
        "parked / resident 1.10x (median of pairs)",
        "slowest parked / median resident 1.50x",
    ]


@pytest.mark.parametrize(
    ("plan", "result", "experiment"),
    [
        (Decode(), [DECODE], "decode"),
        (Turns(), TURNS, "turns"),
        (Prefill(), PREFILL, "prefill"),
        (Warm(), WARM, "warm"),
    ],
)
def test_what_programs_read(plan: object, result: object, experiment: str, model_path: Path) -> None:
    bench = workbench(model_path, weights="int8")
    assert f"{POLICY}; weights int8, cache float32, 1 threads" in report.subject(bench)
    content = json.loads(json.dumps(report.document(bench, plan, result), allow_nan=False))
    assert content["experiment"] == experiment
    assert content["environment"]["policy"] == POLICY
    assert content["environment"]["slot_bytes"] == bench.layout.bytes
    assert {"command", "date", "versions"} < set(content)
    if isinstance(result, list):
        assert [set(row) for row in content["result"]] == [set(type(row).__slots__) for row in result]
    else:
        assert set(content["result"]) == set(type(result).__slots__)
        assert content["result"]["ratio"] in (1.0501, 1.1)
