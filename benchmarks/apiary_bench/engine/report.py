"""What was measured of the bare engine, for people as tables, and for programs as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import torch
from rich.table import Table

from apiary_bench.document import provenance
from apiary_bench.engine.decode import Decode
from apiary_bench.engine.decode import Row as DecodeRow
from apiary_bench.engine.prefill import Prefill
from apiary_bench.engine.prefill import Row as PrefillRow
from apiary_bench.engine.turns import Result as TurnsResult
from apiary_bench.engine.turns import Turns
from apiary_bench.engine.warm import Result as WarmResult
from apiary_bench.engine.warm import Warm
from apiary_bench.engine.workbench import Workbench
from apiary_bench.tables import facts

VERSIONS = ("apiary", "torch", "transformers", "numpy")


def document(bench: Workbench, plan: Any, result: Any) -> dict[str, Any]:
    """All of it. Times in seconds, memory in bytes; fields as in the experiment's plan, and in its `Result`
    or its `Row`s."""
    return {
        **provenance(*VERSIONS),
        "experiment": type(plan).__name__.lower(),
        "arguments": asdict(plan),
        "environment": environment(bench),
        "result": [asdict(row) for row in result] if isinstance(result, list) else asdict(result),
    }


def environment(bench: Workbench) -> dict[str, Any]:
    """What was measured: the worker's settings, and the policy of its sessions."""
    names = ("model", "weights", "dtype", "cache_dtype", "backend", "device", "step_tokens", "workspaces")
    return {
        **{name: getattr(bench.settings, name) for name in names},
        "policy": str(bench.policy),
        "slot_bytes": bench.layout.bytes,
        "threads": torch.get_num_threads(),
    }


def subject(bench: Workbench) -> str:
    """The same for people."""
    found = environment(bench)
    return "{model}, {policy}; weights {weights}, cache {cache_dtype}, {threads} threads".format(**found)


def decode(plan: Decode, rows: Sequence[DecodeRow]) -> tuple[str, Table]:
    """What was asked, and a row for each number of sessions."""
    table = _table(
        "sessions",
        "prefill tokens/s",
        "decode tokens/s",
        "ms a step",
        "p99",
        "output tokens/s",
        "cache peak MiB",
        "of budget",
    )
    for row in rows:
        table.add_row(
            str(row.sessions),
            f"{row.prefill_throughput:.1f}",
            f"{row.decode_throughput:.1f}",
            *(f"{1000 * seconds:.1f}" for seconds in (row.step_p50, row.step_p99)),
            f"{row.output_throughput:.1f}",
            *(f"{size / 2**20:,.0f}" for size in (row.peak_bytes, row.budget_bytes)),
        )
    asked = f"decode: {plan.prompt} in, {plan.output} out"
    asked += f", after {plan.history} of history" if plan.history else ""
    return f"{asked}; {_repeats(plan.repeats)}", table


def turns(plan: Turns, result: TurnsResult) -> tuple[str, Table]:
    """What was asked; the early and the late turns, and their ratio."""
    table = _table("turns", "ms per output token")
    for first, seconds in ((plan.early, result.early), (plan.late, result.late)):
        last = first + result.averaged - 1
        table.add_row(f"{first} to {last}" if last > first else str(first), f"{1000 * seconds:.2f}")
    table.add_row("late / early", f"{result.ratio:.3f}x")
    tokens = result.period * (plan.input + plan.output)
    asked = (
        f"turns: {plan.sessions} sessions, {plan.input} in, {plan.output} out, after {result.history} of "
        f"history; {_repeats(plan.repeats)}\n"
        f"a compaction period is {tokens} tokens ({result.period} turns); averages over "
        f"{result.averaged // result.period} of them"
    )
    return asked, table


def prefill(plan: Prefill, rows: Sequence[PrefillRow]) -> tuple[str, Table]:
    """What was asked, and a row for each length."""
    table = _table("prompt tokens", "seconds", "tokens/s", "against half as many")
    for row in rows:
        doubling = "-" if row.doubling is None else f"{row.doubling:.2f}x"
        table.add_row(f"{row.tokens:,}", f"{row.seconds:.3f}", f"{row.throughput:.1f}", doubling)
    return f"prefill: one prompt at a time; {_repeats(plan.repeats)}", table


def warm(plan: Warm, result: WarmResult) -> tuple[str, Table]:
    """What was asked; memory and first tokens."""
    table = facts(
        ("resident", f"{result.resident} sessions"),
        ("parked", f"{result.parked} sessions"),
        ("a slot, resident or parked", f"{result.slot_bytes / 2**20:.1f} MiB"),
        ("cache budget in use", _gib(result.used_bytes)),
        ("parked caches", _gib(result.parked_bytes)),
        ("both", _gib(result.held_bytes)),
        ("full caches would take", _gib(result.full_bytes)),
        ("process (RSS)", f"{_gib(result.rss_bytes)}; before the sessions {_gib(result.rss_before_bytes)}"),
        ("first token, resident", _milliseconds(result.resident_ttft)),
        ("first token, parked", _milliseconds(result.parked_ttft)),
        ("parked / resident", f"{result.ratio:.2f}x (median of pairs)"),
        ("slowest parked / median resident", f"{result.worst:.2f}x"),
    )
    asked = f"warm: {plan.sessions} sessions x {plan.history} of history; next turns of {plan.input} tokens"
    return f"{asked}, {plan.pairs} pairs", table


def _table(*headings: str) -> Table:
    table = Table()
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _repeats(count: int) -> str:
    return "measured once" if count == 1 else f"medians of {count}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _milliseconds(seconds: Sequence[float]) -> str:
    low, middle, high = (1000 * each for each in (min(seconds), median(seconds), max(seconds)))
    return f"{middle:.0f} ms (median; {low:.0f} to {high:.0f})"
