"""Samples with given scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from apiary_bench.quality.sample import Sample
from apiary_bench.quality.tasks.task import Outcome

TARGET = 1000.0


def sample(
    task: str,
    scores: Mapping[str, Sequence[Mapping[str, float]]],
    *,
    held: Mapping[str, Sequence[float]] | None = None,
    **changes: Any,
) -> Sample:
    """A task's sample, from the scores of each policy on each document and the bytes where they are not those
    of the target. A policy's bound is 100 and the document's number."""
    outcomes = {}
    for label, documents in scores.items():
        name, _, rest = label.partition("(")
        target = None if name == "full" else TARGET
        bytes_ = (held or {}).get(label, [TARGET] * len(documents))
        outcomes[label] = [
            Outcome(f"{name}(number={i},{rest}", 100 + i, 9.0, here, 2000, target, dict(each))
            for i, (each, here) in enumerate(zip(documents, bytes_, strict=True))
        ]
    settings: dict[str, Any] = {"model": "tiny", "weights": "fp32", "match": "bytes", "seed": 0}
    settings["baseline"] = "full"
    return Sample(
        task=task,
        budget={"entries": 90},
        outcomes=outcomes,
        **(settings | {"slot_bytes": dict.fromkeys(scores, 3_000_000)} | changes),
    )
