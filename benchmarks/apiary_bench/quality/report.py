"""What a run found: estimates, intervals and paired comparisons."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from apiary_bench.quality.sample import Sample
from apiary_bench.quality.sizing import TOLERANCE
from apiary_bench.quality.statistics import Estimate, Values, difference, estimate, ratio
from apiary_bench.quality.tasks.task import Metric, Outcome

_RIVALS = {"h2o", "streaming"}


@dataclass(frozen=True, slots=True)
class Row:
    """A policy over a task's documents.

    Attributes:
        label: as the user wrote it.
        policies: as it ran, at its smallest and its largest bound.
        entries, bytes: the means of the documents' averages.
        peak_bytes: the most of any document.
        slot_bytes: as in `Sample`.
        deviation: of the average bytes from the mean target, relative; None where they were not to match.
        worst_deviation: of the document whose average is farthest from its own target.
        scores: by metric.
        baseline, rival, other: paired differences of this policy less the baseline, the best of H2O and
            StreamingLLM, and the best that evicts and has another name, by metric.
        others: which that is, by metric.
        relative: this policy's number as a part of the full cache's, paired, for metrics where that says
            something.
        outcomes: by document.
    """

    label: str
    policies: tuple[str, str]
    entries: float
    bytes: float
    peak_bytes: int
    slot_bytes: int | None
    deviation: float | None
    worst_deviation: float | None
    scores: dict[str, Estimate]
    baseline: dict[str, Estimate]
    rival: dict[str, Estimate]
    other: dict[str, Estimate]
    others: dict[str, str]
    relative: dict[str, Estimate]
    outcomes: list[Outcome]

    @property
    def matched(self) -> bool | None:
        """Whether the average bytes are within the tolerance of the target."""
        return None if self.deviation is None else abs(self.deviation) <= TOLERANCE


@dataclass(frozen=True, slots=True)
class Section:
    """A sample's rows; `rivals` names for each metric the best of H2O and StreamingLLM that ran."""

    sample: Sample
    rows: list[Row]
    rivals: dict[str, str]


class _Contest:
    """Compares the policies of a sample."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample
        self.names = {
            label: outcomes[0].policy.partition("(")[0] for label, outcomes in sample.outcomes.items()
        }

    def values(self, label: str, metric: Metric) -> Values:
        return np.array([outcome.scores[metric.name] for outcome in self.sample.outcomes[label]])

    def best(self, among: Sequence[str]) -> dict[str, str]:
        """By metric the best of some policies; nothing where there are none."""

        def rank(label: str, metric: Metric) -> tuple[float, str]:
            value = float(metric.statistic(self.values(label, metric)))
            return (value if metric.better == "lower" else -value), label

        return {
            metric.name: min(among, key=lambda label: rank(label, metric))
            for metric in (self.sample.metrics if among else ())
        }

    def rivals(self) -> dict[str, str]:
        return self.best([label for label, name in self.names.items() if name in _RIVALS])

    def others(self, mine: str) -> dict[str, str]:
        out = ("full", self.names[mine])
        return self.best([label for label, name in self.names.items() if name not in out])

    def less(self, label: str, others: dict[str, str]) -> dict[str, Estimate]:
        """The paired differences to what `others` names by metric."""
        return {
            metric.name: difference(
                self.values(label, metric),
                self.values(others[metric.name], metric),
                metric.statistic,
                self.sample.seed,
            )
            for metric in self.sample.metrics
            if metric.name in others
        }

    def relative(self, label: str) -> dict[str, Estimate]:
        found = {
            metric.name: ratio(
                self.values(label, metric), self.values("full", metric), metric.statistic, self.sample.seed
            )
            for metric in self.sample.metrics
            if metric.relative
        }
        return {metric: part for metric, part in found.items() if part is not None}


def sections(samples: Iterable[Sample]) -> list[Section]:
    """Estimate everything."""
    return [_section(sample) for sample in samples]


def _section(sample: Sample) -> Section:
    contest = _Contest(sample)
    rivals = contest.rivals()
    return Section(sample, [_row(contest, label, rivals) for label in sample.outcomes], rivals)


def _row(contest: _Contest, label: str, rivals: dict[str, str]) -> Row:
    sample = contest.sample
    outcomes, others = sample.outcomes[label], contest.others(label)
    ordered = sorted(outcomes, key=lambda outcome: outcome.bound)
    held = float(np.mean([outcome.bytes for outcome in outcomes]))
    matched = outcomes if sample.match == "bytes" else []
    targets = [(each.bytes, each.target_bytes) for each in matched if each.target_bytes is not None]
    return Row(
        label=label,
        policies=(ordered[0].policy, ordered[-1].policy),
        entries=float(np.mean([outcome.entries for outcome in outcomes])),
        bytes=held,
        peak_bytes=max(outcome.peak_bytes for outcome in outcomes),
        slot_bytes=sample.slot_bytes[label],
        deviation=held / float(np.mean([target for _, target in targets])) - 1 if targets else None,
        worst_deviation=max((here / target - 1 for here, target in targets), key=abs, default=None),
        scores={
            metric.name: estimate(contest.values(label, metric), metric.statistic, sample.seed)
            for metric in sample.metrics
        },
        baseline=contest.less(label, {metric.name: sample.baseline for metric in sample.metrics}),
        rival=contest.less(label, rivals),
        other=contest.less(label, others),
        others=others,
        relative=contest.relative(label),
        outcomes=outcomes,
    )
