"""The outcomes of a task by policy: all that estimates, tables and pictures are made of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from apiary_bench.errors import BenchError, SettingsError
from apiary_bench.quality.bench import Bench
from apiary_bench.quality.run import Results, title
from apiary_bench.quality.settings import Settings
from apiary_bench.quality.tasks import TASKS
from apiary_bench.quality.tasks.task import Metric, Outcome
from apiary_server.sessions.pool import SlotLayout
from apiary_server.settings import Settings as Worker
from buzz import parse

_NEAR = 1e-3  # of the same policy on the same document in two runs: sums are rounded in another order


@dataclass(frozen=True, slots=True)
class Sample:
    """A task under a budget.

    Attributes:
        task: its name.
        budget: entries, ratio or both: what of them the task uses.
        model, match, seed, baseline: as in `Settings`.
        weights: their precision, and that of caches, as `Settings.precision` says.
        outcomes: by policy as the user wrote it, and document. `full` comes first.
        slot_bytes: of each policy the memory that a worker reserves for a session at its largest bound;
            None where that is not known.
    """

    task: str
    budget: dict[str, float]
    model: str
    weights: str
    match: str | None
    seed: int
    baseline: str
    outcomes: dict[str, list[Outcome]]
    slot_bytes: dict[str, int | None]

    @classmethod
    def of(cls, settings: Settings, bench: Bench, results: Results) -> Sample:
        """What a run found."""
        columns = zip(*results.outcomes, strict=True)
        outcomes = {each.label: list(column) for each, column in zip(bench.contenders, columns, strict=True)}
        slack = Worker.model_fields["slack"].default
        slots: dict[str, int | None] = {}
        for label, column in outcomes.items():
            largest = parse(max(column, key=lambda outcome: outcome.bound).policy)
            slots[label] = SlotLayout.of(bench.loaded.geometry, largest, slack).bytes
        return cls(
            task=results.stage.task.name,
            budget=results.stage.limits,
            model=settings.model,
            weights=settings.precision,
            match=settings.match,
            seed=settings.seed,
            baseline=settings.baseline,
            outcomes=outcomes,
            slot_bytes=slots,
        )

    @property
    def title(self) -> str:
        """For people."""
        return f"{title(self.task, self.budget)}, {self.documents} documents"

    @property
    def documents(self) -> int:
        """How many."""
        return len(self.outcomes["full"])

    @property
    def metrics(self) -> list[Metric]:
        """The task's, as far as the outcomes have them: a task may have got another one since."""
        scored = self.outcomes["full"][0].scores
        return [metric for metric in TASKS[self.task].metrics if metric.name in scored]

    def only(self, labels: Sequence[str]) -> Sample:
        """Without other policies; `full` and the baseline stay.

        Raises:
            SettingsError: one of them did not run.
        """
        for label in labels:
            if label not in self.outcomes:
                raise SettingsError(f"{label} did not run; those that did: {', '.join(self.outcomes)}")
        kept = {"full", self.baseline, *labels}
        return replace(self, outcomes={label: each for label, each in self.outcomes.items() if label in kept})

    def relabelled(self) -> Sample:
        """With its weights in the names of its policies."""
        return replace(
            self,
            outcomes={f"{label}, {self.weights}": each for label, each in self.outcomes.items()},
            slot_bytes={f"{label}, {self.weights}": each for label, each in self.slot_bytes.items()},
        )

    def joined(self, other: Sample) -> Sample:
        """With the policies of another run of the task over the same documents; those of a run with other
        weights are named by them.

        Raises:
            BenchError: the runs differ in more than policies.
        """
        for name in ("model", "match", "seed", "baseline", "documents"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise BenchError(f"{self.title}: runs with {name} {mine} and {theirs} cannot be joined")
        if self.weights != other.weights:
            other = other.relabelled()
        for label in self.outcomes.keys() & other.outcomes.keys():
            pairs = zip(self.outcomes[label], other.outcomes[label], strict=True)
            if not all(_same(*pair) for pair in pairs):
                raise BenchError(f"{self.title}: {label} has other scores in one run than in the other")
        outcomes = self.outcomes | other.outcomes
        slots = {label: self.slot_bytes.get(label) or other.slot_bytes.get(label) for label in outcomes}
        return replace(self, outcomes=outcomes, slot_bytes=slots)


def join(samples: Iterable[Sample]) -> list[Sample]:
    """One sample for each task and budget.

    Raises:
        BenchError: two of a task and budget differ in more than policies.
    """
    found: dict[str, Sample] = {}
    for sample in samples:
        name = title(sample.task, sample.budget)
        found[name] = found[name].joined(sample) if name in found else sample
    return list(found.values())


def _same(one: Outcome, other: Outcome) -> bool:
    return one.scores.keys() == other.scores.keys() and all(
        math.isclose(one.scores[name], other.scores[name], rel_tol=_NEAR, abs_tol=1e-6) for name in one.scores
    )
