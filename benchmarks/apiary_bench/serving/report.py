"""A run for people, as tables, and for programs, as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.table import Table

from apiary_bench.document import provenance
from apiary_bench.serving.generator import Run
from apiary_bench.serving.interference import Interference, Scene
from apiary_bench.serving.record import Record
from apiary_bench.serving.statistics import Distribution, Summary
from apiary_bench.serving.workload import Workload
from apiary_bench.tables import facts
from apiary_client import Capacity, Model

_VERSIONS = ("apiary", "grpcio", "protobuf")


def document(workload: Workload, run: Run, summary: Summary) -> dict[str, Any]:
    """All of it. Times in seconds; fields as in `Workload`, `Model`, `Capacity`, `Summary` and `Record`."""
    return {
        **provenance(*_VERSIONS),
        "arguments": asdict(workload),
        "environment": {
            "model": asdict(run.model),
            "policy": run.policy,
            "capacity_before": asdict(run.before),
            "capacity_after": None if run.after is None else asdict(run.after),
        },
        "summary": asdict(summary),
        "requests": [_request(record) for record in run.records],
        "undeleted_sessions": list(run.undeleted),
    }


def _request(record: Record) -> dict[str, Any]:
    return asdict(record) | {"ttft": record.ttft, "tpot": record.tpot, "tokens": record.tokens}


def heading(workload: Workload, run: Run) -> str:
    """What was asked of whom."""
    asked = f"{workload.sessions} sessions x {workload.turns} turns"
    asked += f", {workload.input} in, {workload.output} out"
    if workload.history:
        asked += f", after {workload.history} of history"
    asked += f"; {workload.arrival}" + (f" at {workload.rate:g} turns/s" if workload.rate is not None else "")
    return f"{asked}\n{worker(run.model, run.policy, run.before)}"


def latencies(summary: Summary) -> Table:
    """The distributions, in milliseconds; a row for each that there is."""
    table = Table("milliseconds")
    for heading in ("mean", "p50", "p90", "p99", "max"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = {
        "time to first token (TTFT)": summary.ttft,
        "time per output token (TPOT)": summary.tpot,
        "inter-token latency (ITL)": summary.itl,
        "end-to-end latency (E2EL)": summary.e2el,
        "start delay": summary.delay,
    }
    for label, found in rows.items():
        if found is not None:
            table.add_row(label, *_milliseconds(found))
    return table


def totals(workload: Workload, summary: Summary) -> Table:
    """Counts and rates."""
    return facts(
        ("turns", _turns(summary)),
        ("measured", f"{summary.duration:.2f} s"),
        ("turns/s", f"{summary.request_throughput:.3f}"),
        ("output tokens/s", f"{summary.output_throughput:.1f}"),
        ("all tokens/s", f"{summary.total_throughput:.1f}"),
        ("goodput", _goodput(workload, summary)),
        ("tokens not re-prefilled", f"{summary.cached_tokens}, beside {summary.input_tokens} of input"),
        ("tokens per message", _number(summary.tokens_per_message)),
    )


def interference_document(scene: Scene, found: Interference) -> dict[str, Any]:
    """All of it. Times in seconds; fields as in `Scene`, `Interference` and `Time`."""
    times = [asdict(time) | {"slowdown": time.slowdown, "wait": time.wait} for time in found.times]
    return {
        **provenance(*_VERSIONS),
        "arguments": asdict(scene),
        "environment": {"model": asdict(found.model), "capacity": asdict(found.capacity)},
        "summary": {"slowdown": found.slowdown, "wait": found.wait},
        "times": times,
    }


def interference_heading(scene: Scene, found: Interference) -> str:
    """What was asked of whom."""
    policy = scene.policy or found.model.default_policy
    return (
        f"a prompt of {scene.prompt} tokens beside {scene.streams} streams with {scene.history} of history\n"
        f"{worker(found.model, policy, found.capacity)}"
    )


def interference(found: Interference) -> Table:
    """Each time, in milliseconds, and the medians."""
    table = Table("milliseconds", "p99 ITL before", "beside", "slowdown", "TTFT alone", "beside", "wait")
    for column in table.columns[1:]:
        column.justify = "right"
    for number, time in enumerate(found.times, 1):
        figures = (time.quiet.p99, time.loaded.p99, time.alone, time.beside)
        before, loaded, alone, beside = (f"{1000 * seconds:.1f}" for seconds in figures)
        table.add_row(
            str(number), before, loaded, f"{time.slowdown:.2f}x", alone, beside, f"{time.wait:.2f}x"
        )
    table.add_section()
    table.add_row("median", "", "", f"{found.slowdown:.2f}x", "", "", f"{found.wait:.2f}x")
    return table


def worker(model: Model, policy: str, capacity: Capacity) -> str:
    """A worker in a line."""
    return (
        f"{model.name.removeprefix('models/')}, {policy}; weights {model.weight_dtype}, "
        f"cache {model.cache_dtype}, budget {capacity.budget_bytes / 2**20:,.0f} MiB"
    )


def _turns(summary: Summary) -> str:
    outcomes = ", ".join(
        f"{count} {outcome.replace('_', ' ')}" for outcome, count in summary.turns.items() if count
    )
    reasons = ", ".join(f"{reason} {count}" for reason, count in summary.reasons.items())
    return outcomes + (f" ({reasons})" if reasons else "") + (": VOID" if summary.void else "")


def _milliseconds(found: Distribution) -> list[str]:
    return [f"{1000 * value:.1f}" for value in (found.mean, found.p50, found.p90, found.p99, found.max)]


def _goodput(workload: Workload, summary: Summary) -> str:
    if summary.goodput is None:
        return "no objectives were set"
    limits = {"TTFT": workload.objectives.ttft, "TPOT": workload.objectives.tpot}
    kept = ", ".join(f"{name} {1000 * limit:g} ms" for name, limit in limits.items() if limit is not None)
    return f"{summary.goodput:.3f} turns/s ({summary.good} kept {kept})"


def _number(value: float | None) -> str:
    return "none came" if value is None else f"{value:.2f}"
