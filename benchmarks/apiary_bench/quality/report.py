"""What a run found: estimates, intervals and paired differences, as JSON and as tables."""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from apiary_bench.errors import BenchError
from apiary_bench.quality.bench import Bench
from apiary_bench.quality.run import Results
from apiary_bench.quality.settings import Settings
from apiary_bench.quality.sizing import TOLERANCE
from apiary_bench.quality.statistics import Estimate, Values, difference, estimate
from apiary_bench.quality.tasks.task import Metric, Outcome

_RIVALS = {"h2o", "streaming"}
_VERSIONS = ("apiary", "torch", "transformers", "rouge-score", "numpy")


@dataclass(frozen=True, slots=True)
class Row:
    """A policy over a stage's documents.

    Attributes:
        label: as the user wrote it.
        policies: as it ran, at its smallest and its largest bound.
        entries, bytes: the means of the documents' averages.
        peak_bytes: the most of any document.
        deviation: of the average bytes from the mean target, relative; None where nothing was to match.
        scores: by metric.
        baseline, rival: paired differences of this policy less the other, by metric.
        outcomes: by document.
    """

    label: str
    policies: tuple[str, str]
    entries: float
    bytes: float
    peak_bytes: int
    deviation: float | None
    scores: dict[str, Estimate]
    baseline: dict[str, Estimate]
    rival: dict[str, Estimate]
    outcomes: list[Outcome]

    @property
    def matched(self) -> bool | None:
        """Whether the average bytes are within the tolerance of the target."""
        return None if self.deviation is None else abs(self.deviation) <= TOLERANCE


@dataclass(frozen=True, slots=True)
class Section:
    """A stage's rows; `rivals` names for each metric the best of H2O and StreamingLLM that ran."""

    results: Results
    rows: list[Row]
    rivals: dict[str, str]


def sections(settings: Settings, bench: Bench, results: list[Results]) -> list[Section]:
    """Estimate everything."""
    return [_section(settings, bench, each) for each in results]


def _section(settings: Settings, bench: Bench, results: Results) -> Section:
    metrics = results.stage.task.metrics
    labels = [contender.label for contender in bench.contenders]
    columns = {label: [row[i] for row in results.outcomes] for i, label in enumerate(labels)}

    def values(label: str, metric: Metric) -> Values:
        return np.array([outcome.scores[metric.name] for outcome in columns[label]])

    rivals: dict[str, str] = {}
    for metric in metrics:
        sign = 1 if metric.better == "lower" else -1
        among = [
            (sign * float(metric.statistic(values(each.label, metric))), each.label)
            for each in bench.contenders
            if each.policy.name in _RIVALS
        ]
        if among:
            rivals[metric.name] = min(among)[1]

    def against(label: str, metric: Metric, other: str) -> Estimate:
        return difference(values(label, metric), values(other, metric), metric.statistic, settings.seed)

    rows = []
    for label, outcomes in columns.items():
        ordered = sorted(outcomes, key=lambda outcome: outcome.bound)
        held = float(np.mean([outcome.bytes for outcome in outcomes]))
        targets = [outcome.target_bytes for outcome in outcomes if outcome.target_bytes is not None]
        row = Row(
            label=label,
            policies=(ordered[0].policy, ordered[-1].policy),
            entries=float(np.mean([outcome.entries for outcome in outcomes])),
            bytes=held,
            peak_bytes=max(outcome.peak_bytes for outcome in outcomes),
            deviation=held / float(np.mean(targets)) - 1 if targets else None,
            scores={
                metric.name: estimate(values(label, metric), metric.statistic, settings.seed)
                for metric in metrics
            },
            baseline={metric.name: against(label, metric, settings.baseline) for metric in metrics},
            rival={
                metric.name: against(label, metric, rivals[metric.name])
                for metric in metrics
                if metric.name in rivals
            },
            outcomes=outcomes,
        )
        rows.append(row)
    return Section(results, rows, rivals)


def document(settings: Settings, found: list[Section]) -> dict[str, Any]:
    """All of it, for programs."""
    return {
        "command": " ".join(["apiary", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _VERSIONS},
        "model": settings.model,
        "settings": asdict(settings) | {"data": str(settings.data)},
        "tasks": [_task(section) for section in found],
    }


def _task(section: Section) -> dict[str, Any]:
    stage = section.results.stage
    budget = {use: getattr(stage.budget, use) for use in sorted(stage.task.budget)}
    metrics = [{"name": metric.name, "better": metric.better} for metric in stage.task.metrics]
    return {
        "task": stage.task.name,
        "budget": budget,
        "documents": len(stage.documents),
        "metrics": metrics,
        "rivals": section.rivals,
        "policies": [
            asdict(row)
            | {"policies": {"smallest": row.policies[0], "largest": row.policies[1]}, "matched": row.matched}
            for row in section.rows
        ],
    }


def write(path: Path, content: dict[str, Any]) -> None:
    """Write JSON, whole or not at all.

    Raises:
        BenchError: it cannot be written.
    """
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        Path(file.name).chmod(0o644)
        Path(file.name).replace(path)
    except OSError as error:
        raise BenchError(f"{path} cannot be written: {error}") from error


def table(settings: Settings, section: Section) -> Table:
    """A stage for people. Differences are of the first metric."""
    stage = section.results.stage
    first = stage.task.metrics[0]
    shown = Table(title=f"{stage.name}, {len(stage.documents)} documents", title_justify="left")
    shown.add_column("policy", overflow="fold")
    for name in ("entries", "MB", "peak MB", *(metric.name for metric in stage.task.metrics)):
        shown.add_column(name, justify="right")
    shown.add_column(f"{first.name} less {settings.baseline}", justify="right")
    if section.rivals:
        shown.add_column(f"{first.name} less {section.rivals[first.name]}", justify="right")
    for row in section.rows:
        label = row.label
        if row.matched is False:
            label += f" (not matched: {row.deviation:+.1%})"
        cells = [label, f"{row.entries:.0f}", f"{row.bytes / 1e6:.1f}", f"{row.peak_bytes / 1e6:.1f}"]
        cells += [_words(row.scores[metric.name], metric) for metric in stage.task.metrics]
        cells.append("" if row.label == settings.baseline else _words(row.baseline[first.name], first, "+"))
        if section.rivals:
            same = row.label == section.rivals[first.name]
            cells.append("" if same else _words(row.rival[first.name], first, "+"))
        shown.add_row(*cells)
    return shown


def _words(found: Estimate, metric: Metric, sign: str = "") -> str:
    form = f"{sign}.{metric.digits}f"
    return f"{found.value:{form}} [{found.low:{form}}, {found.high:{form}}]"
