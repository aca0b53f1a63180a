"""What forks cost, for people as tables, and for programs as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from apiary_bench.fork.run import Fork, Forks, Plan
from apiary_bench.own import report
from apiary_bench.serving.report import worker
from apiary_bench.tables import facts

_MIB = 2**20


def document(plan: Plan, flags: Mapping[str, str], found: Forks) -> dict[str, Any]:
    """All of it. Times in seconds; fields as in `Plan`, `Forks`, `Fork` and `First`."""
    summary = ("fork", "beyond", "first", "copied_bytes", "made", "answered")
    return {
        **report.origin(found.model, found.capacity, flags, plan),
        "summary": {name: getattr(found, name) for name in summary},
        "forks": [asdict(fork) for fork in found.forks],
        "firsts": [asdict(first) for first in found.firsts],
    }


def heading(plan: Plan, found: Forks) -> str:
    """What was asked of whom."""
    return (
        f"{plan.forks:,} forks of a session of {plan.history:,} tokens, one after the other, under a budget "
        f"that holds {plan.holds:,}\n{worker(found.model, found.model.default_policy, found.capacity)}"
    )


def forks(found: Forks) -> Table:
    """A row for each kind of fork."""
    table = report.times("milliseconds", "forks", "MiB copied for each")
    for label, kind in (("fork", found.roomy), ("beyond the budget", found.displacing)):
        if kind:
            table.add_row(
                label, *report.milliseconds([fork.seconds for fork in kind]), str(len(kind)), _copied(kind)
            )
    return table


def answers(plan: Plan, found: Forks) -> Table:
    """First tokens of the next turns."""
    return report.first_tokens({f"next turns, {plan.concurrency} at a time": found.firsts})


def sessions(plan: Plan, found: Forks) -> Table:
    """Where the sessions were, and that they answered."""
    return facts(
        ("after the last fork", _states(found.made)),
        ("after the last answer", _states(found.answered)),
        ("copied in all", f"{found.copied_bytes / _MIB:,.0f} MiB"),
        ("answered, all alike", f"{len(found.firsts):,} sessions, {plan.output} tokens each"),
    )


def _copied(forks: Sequence[Fork]) -> str:
    least, most = (pick(fork.copied_bytes for fork in forks) / _MIB for pick in (min, max))
    return f"{least:.1f} to {most:.1f}" if most > least else f"{least:.1f}"


def _states(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {state}" for state, count in sorted(counts.items()))
