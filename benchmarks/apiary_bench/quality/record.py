"""A run's results as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from apiary_bench.document import provenance
from apiary_bench.errors import BenchError
from apiary_bench.quality.report import Section
from apiary_bench.quality.sample import Sample
from apiary_bench.quality.settings import Settings, precision
from apiary_bench.quality.tasks import TASKS
from apiary_bench.quality.tasks.task import Outcome

_VERSIONS = ("apiary", "torch", "transformers", "rouge-score", "numpy")


def document(settings: Settings, found: list[Section]) -> dict[str, Any]:
    """All of it, for programs, and for `read`."""
    return {
        **provenance(*_VERSIONS),
        "model": settings.model,
        "settings": asdict(settings) | {"data": str(settings.data)},
        "tasks": [_task(section) for section in found],
    }


def _task(section: Section) -> dict[str, Any]:
    sample = section.sample
    return {
        "task": sample.task,
        "budget": sample.budget,
        "documents": sample.documents,
        "metrics": [{"name": metric.name, "better": metric.better} for metric in sample.metrics],
        "rivals": section.rivals,
        "policies": [
            asdict(row)
            | {"policies": {"smallest": row.policies[0], "largest": row.policies[1]}, "matched": row.matched}
            for row in section.rows
        ],
    }


def read(path: Path) -> list[Sample]:
    """What was written of a `document`, now or by an earlier version: estimates are made anew.

    Raises:
        BenchError: it cannot be read, or holds no results.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return [_sample(content["settings"], task) for task in content["tasks"]]
    except OSError as error:
        raise BenchError(f"{path} cannot be read: {error}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise BenchError(
            f"{path} has no results of `apiary bench quality --json`: {type(error).__name__}: {error}"
        ) from error


def _sample(settings: Mapping[str, Any], task: Mapping[str, Any]) -> Sample:
    rows = {row["label"]: row for row in task["policies"]}
    sample = Sample(
        task=task["task"],
        budget=dict(task["budget"]),
        **{name: settings[name] for name in ("model", "match", "seed", "baseline")},
        weights=precision(settings.get("weights", "fp32"), settings.get("cache_dtype", "float32")),
        outcomes={label: [Outcome(**each) for each in row["outcomes"]] for label, row in rows.items()},
        slot_bytes={label: row.get("slot_bytes") for label, row in rows.items()},
    )
    if sample.task not in TASKS or not sample.metrics:
        raise ValueError(f"the task {sample.task!r} and its scores are unknown")
    if sample.baseline not in rows:
        raise ValueError(f"the baseline {sample.baseline!r} is none of the policies")
    for label, outcomes in sample.outcomes.items():
        names = [set(outcome.scores) for outcome in outcomes]
        if len(names) != sample.documents or any(each != names[0] for each in names):
            raise ValueError(f"{label} lacks scores of {sample.task}")
    return sample
