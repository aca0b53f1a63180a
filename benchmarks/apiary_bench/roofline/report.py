"""Steps beside their floors: tables for people, and JSON for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.table import Table

from apiary_bench.document import provenance
from apiary_bench.engine.report import VERSIONS, environment, subject
from apiary_bench.engine.workbench import Workbench
from apiary_bench.roofline.ceilings import Ceilings
from apiary_bench.roofline.part import Part
from apiary_bench.roofline.run import Plan, Result


def document(bench: Workbench, plan: Plan, result: Result) -> dict[str, Any]:
    """All of it. Times in seconds, rates per second; fields as in `Plan`, `Ceilings` and `Row`."""
    return {
        **provenance(*VERSIONS),
        "arguments": asdict(plan),
        "environment": environment(bench),
        "ceilings": asdict(result.ceilings),
        "period": result.period,
        "rows": [
            asdict(row)
            | {
                "least": row.least,
                "times_floor": {"median": row.median / row.least, "mean": row.mean / row.least},
            }
            for row in result.rows
        ],
    }


def heading(bench: Workbench, plan: Plan, result: Result) -> str:
    """What was asked of whom, and the ceilings."""
    steps = len(result.rows[0].steps)
    return (
        f"roofline: {steps} steps after {plan.history} of history; the compaction period is {result.period}\n"
        f"{subject(bench)}\n{_ceilings(result.ceilings)}"
    )


def _ceilings(found: Ceilings) -> str:
    text = (
        f"copy {found.copy / 1e9:.1f} GB/s (read alone {found.read / 1e9:.1f}), "
        f"products {found.gemm / 1e9:.0f} Gflop/s"
    )
    return text if found.int8 is None else f"{text}, of int8 {found.int8 / 1e9:.0f} Gop/s"


def steps(result: Result) -> Table:
    """The time of a step as a multiple of its floor, a row for each number of sessions."""
    table = Table()
    for name in (
        "sessions",
        "entries each",
        "floor ms",
        "median ms",
        "x floor",
        "mean ms",
        "x floor",
        "p99 ms",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result.rows:
        table.add_row(
            str(row.sessions),
            f"{row.load.entries / row.load.rows:.0f}",
            _ms(row.least),
            _ms(row.median),
            f"{row.median / row.least:.2f}",
            _ms(row.mean),
            f"{row.mean / row.least:.2f}",
            _ms(row.p99),
        )
    return table


def parts(result: Result) -> Table:
    """The mean milliseconds of each part, and of its floor."""
    table = Table("part")
    for row in result.rows:
        for name in (f"{row.sessions}: ms", "floor"):
            table.add_column(name, justify="right", no_wrap=True)
    for part in Part:
        cells = (
            (_ms(row.parts[part]), _ms(row.floor[part]) if part in row.floor else "") for row in result.rows
        )
        table.add_row(part, *(text for pair in cells for text in pair))
    totals = ((_ms(row.mean), _ms(row.least)) for row in result.rows)
    table.add_section()
    table.add_row("step", *(text for pair in totals for text in pair))
    return table


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2f}"
