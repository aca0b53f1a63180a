"""What restarts cost, for people as tables, and for programs as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.table import Table

from apiary_bench.own import report
from apiary_bench.resume.run import Plan, Resume
from apiary_bench.serving.report import worker
from apiary_bench.tables import facts


def document(plan: Plan, flags: Mapping[str, str], found: Resume) -> dict[str, Any]:
    """All of it. Times in seconds; fields as in `Plan`, `Resume` and `Repeat`."""
    summary = ("warm", "resumed", "recomputed", "slowdown", "gain", "ready", "snapshot_bytes")
    return {
        **report.origin(found.model, found.capacity, flags, plan),
        "summary": {name: getattr(found, name) for name in summary},
        "repeats": [asdict(repeat) for repeat in found.repeats],
    }


def heading(plan: Plan, found: Resume) -> str:
    """What was asked of whom."""
    end = "SIGKILL" if plan.kill else "SIGTERM"
    beside = f" beside {plan.others} others" if plan.others else ""
    return (
        f"{plan.repeats} sessions of {plan.history:,} tokens{beside}, turns of {plan.input} in and 1 out; "
        f"workers end by {end}\n{worker(found.model, found.model.default_policy, found.capacity)}"
    )


def first_tokens(found: Resume) -> Table:
    """A row for each kind of turn: its first token, and what it found."""
    return report.first_tokens(
        {
            "warm": [first for repeat in found.repeats for first in repeat.warm],
            "after the ready line": [repeat.resumed for repeat in found.repeats],
            "after it, without the snapshot": [repeat.recomputed for repeat in found.repeats],
        }
    )


def ratios(found: Resume) -> Table:
    """Medians beside each other."""
    return facts(
        ("after the ready line / warm", f"{found.slowdown:.2f}x"),
        ("without the snapshot / with it", f"{found.gain:.1f}x"),
        ("process start to ready line", f"{found.ready:.2f} s"),
        ("snapshot", f"{found.snapshot_bytes / 2**20:.1f} MiB"),
    )
