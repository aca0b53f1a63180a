"""What restarts cost, for people as tables, and for programs as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from rich.table import Table
from rich.text import Text

from apiary_bench.document import provenance
from apiary_bench.resume.run import First, Plan, Resume
from apiary_bench.serving.report import worker


def document(plan: Plan, flags: Mapping[str, str], found: Resume) -> dict[str, Any]:
    """All of it. Times in seconds; fields as in `Plan`, `Resume` and `Repeat`."""
    summary = ("warm", "resumed", "recomputed", "slowdown", "gain", "ready", "snapshot_bytes")
    return {
        **provenance("apiary", "torch", "grpcio", "safetensors"),
        "arguments": asdict(plan),
        "environment": {
            "model": asdict(found.model),
            "capacity": asdict(found.capacity),
            "flags": dict(flags),
        },
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
    table = Table("first token, milliseconds")
    for name in ("median", "least", "most", "cached tokens", "rebuild reason"):
        table.add_column(name, justify="right", no_wrap=True)
    for label, firsts in (
        ("warm", [first for repeat in found.repeats for first in repeat.warm]),
        ("after the ready line", [repeat.resumed for repeat in found.repeats]),
        ("after it, without the snapshot", [repeat.recomputed for repeat in found.repeats]),
    ):
        table.add_row(label, *_row(firsts))
    return table


def ratios(found: Resume) -> Table:
    """Medians beside each other."""
    table = Table.grid(padding=(0, 2))
    for label, value in (
        ("after the ready line / warm", f"{found.slowdown:.2f}x"),
        ("without the snapshot / with it", f"{found.gain:.1f}x"),
        ("process start to ready line", f"{found.ready:.2f} s"),
        ("snapshot", f"{found.snapshot_bytes / 2**20:.1f} MiB"),
    ):
        table.add_row(Text(label, style="dim"), value)
    return table


def _row(firsts: Sequence[First]) -> list[str]:
    seconds = [first.seconds for first in firsts]
    cached = sorted(first.cached_tokens for first in firsts)
    return [
        *(f"{1000 * each:.1f}" for each in (median(seconds), min(seconds), max(seconds))),
        f"{cached[0]:,} to {cached[-1]:,}" if cached[-1] > cached[0] else f"{cached[0]:,}",
        ", ".join(sorted({first.rebuild_reason or "none" for first in firsts})),
    ]
