"""What a task is: documents, and the scores of every policy on one of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, Literal, TypeVar

from apiary_bench.quality.bench import Bench, Budget
from apiary_bench.quality.memory import Footprint
from apiary_bench.quality.sizing import Sized
from apiary_bench.quality.statistics import Statistic, mean

Document = TypeVar("Document")


@dataclass(frozen=True, slots=True)
class Metric:
    """A score of a document, and how documents make a number.

    Attributes:
        name: of the number, in tables and JSON.
        better: which way.
        statistic: over documents.
        digits: behind the point, in tables.
        relative: whether a part of the full cache's number says something.
    """

    name: str
    better: Literal["higher", "lower"]
    statistic: Statistic = mean
    digits: int = 3
    relative: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """One policy on one document.

    Attributes:
        policy: its specification as it ran.
        bound: of that policy.
        entries, bytes, peak_bytes: as in `Footprint`.
        target_bytes: what the average was to match; None where nothing was to be matched.
        scores: by metric; what the metric's statistic reduces.
    """

    policy: str
    bound: int
    entries: float
    bytes: float
    peak_bytes: int
    target_bytes: float | None
    scores: dict[str, float]

    @classmethod
    def of(cls, sized: Sized, footprint: Footprint, scores: dict[str, float]) -> Outcome:
        """The outcome of a policy with the memory that it took."""
        return cls(
            policy=str(sized.policy),
            bound=sized.policy.bound,
            entries=footprint.entries,
            bytes=footprint.bytes,
            peak_bytes=footprint.peak_bytes,
            target_bytes=sized.target_bytes,
            scores=scores,
        )


class Task(ABC, Generic[Document]):
    """One way to measure quality.

    Attributes:
        name: on the command line.
        metrics: the first is the one that policies are compared by.
        limit: documents by default.
        together: documents that are run at once, where that saves time.
        files: of the data directory that it reads.
        budget: what of a budget counts: entries, ratio or both.
    """

    name: str
    metrics: ClassVar[tuple[Metric, ...]]
    limit: int
    together: ClassVar[int] = 1
    files: tuple[str, ...]
    budget: ClassVar[frozenset[Literal["entries", "ratio"]]]

    @abstractmethod
    def documents(self, data: Path, bench: Bench, limit: int, seed: int) -> Sequence[Document]:
        """The first `limit` documents, fewer where the data has no more; a document does not depend on
        `limit`.

        Raises:
            DataError: the data is missing or malformed.
        """

    @abstractmethod
    def prompt(self, document: Document) -> Sequence[int]:
        """The token ids of a document before anything is asked or generated."""

    def segments(self, document: Document) -> Sequence[Sequence[int]]:
        """The token ids that a document feeds before anything is generated, cut where the cache considers
        compaction: the prompt, whole."""
        return [self.prompt(document)]

    @abstractmethod
    def target(self, document: Document, budget: Budget) -> float:
        """The entries that a cache without states would hold on average."""

    @abstractmethod
    def run(
        self, documents: Sequence[Document], targets: Sequence[float], bench: Bench
    ) -> list[list[Outcome]]:
        """For each document the outcome of each policy, in the bench's order; `targets` are in entries."""
