"""Perplexity of running text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from apiary_bench.errors import DataError
from apiary_bench.quality import data as files
from apiary_bench.quality.bench import Bench, Budget
from apiary_bench.quality.ensemble import Ensemble
from apiary_bench.quality.generation import surprise
from apiary_bench.quality.memory import Segment, Trace
from apiary_bench.quality.statistics import perplexity
from apiary_bench.quality.tasks.task import Metric, Outcome, Task
from apiary_server.model.types import Text


@dataclass(frozen=True)
class WikiText(Task[list[int]]):
    """Segments of the text in order, fed in chunks, each of which is one segment of the cache.

    The perplexity is that of the tokens after a warm-up. Memory is averaged over the same tokens: of each,
    what the cache held when its chunk began.

    Attributes:
        length: tokens of a document.
        warmup: tokens of it that are not scored.
        chunk: tokens fed at a time.
    """

    length: int = 3072
    warmup: int = 1000
    chunk: int = 64

    name = "wikitext"
    metrics = (Metric("perplexity", "lower", perplexity, digits=2, relative=True),)
    limit = 20
    files = ("wikitext2.txt",)
    budget = frozenset({"entries"})

    def documents(self, data: Path, bench: Bench, limit: int, seed: int) -> Sequence[list[int]]:
        bench.require_positions("a segment of running text", self.length)
        ids = bench.loaded.tokenizer.encode(Text(text=files.text(data, self.files[0])))
        if len(ids) < self.length:
            raise DataError(
                f"{data / self.files[0]} has {len(ids)} tokens, less than one segment of {self.length}"
            )
        starts = range(0, len(ids) - self.length + 1, self.length)[:limit]
        return [ids[start : start + self.length] for start in starts]

    def prompt(self, document: list[int]) -> Sequence[int]:
        return document

    def segments(self, document: list[int]) -> Sequence[Sequence[int]]:
        return [document[start:end] for start, end in self._chunks()]

    def target(self, document: list[int], budget: Budget) -> float:
        return budget.entries

    def run(
        self, documents: Sequence[list[int]], targets: Sequence[float], bench: Bench
    ) -> list[list[Outcome]]:
        return [self._run(*each, bench) for each in zip(documents, targets, strict=True)]

    def _run(self, document: list[int], target: float, bench: Bench) -> list[Outcome]:
        sized = bench.sized(self._trace(), target)
        policies = [each.policy for each in sized]
        ensemble = Ensemble(bench.loaded, policies, self.length)
        ensemble.resize(policies, self.chunk)
        total = [0.0] * len(policies)
        for start, end in self._chunks():
            scored = self._scored(start, end)
            following = [document[place + 1] for place in scored]
            looked = ensemble.read(document[start:end], at=[place - start for place in scored])
            if scored:
                for i, logits in enumerate(looked):
                    total[i] += surprise(logits, following) * len(scored)
            ensemble.end()
        count = self.length - self.warmup
        return [
            Outcome.of(each, each.footprint, {"perplexity": nll / count})
            for each, nll in zip(sized, total, strict=True)
        ]

    def _chunks(self) -> list[tuple[int, int]]:
        starts = [*range(0, self.length, self.chunk), self.length]
        return list(pairwise(starts))

    def _scored(self, start: int, end: int) -> range:
        """The places in a chunk whose next token is scored."""
        return range(max(start, self.warmup - 1), min(end, self.length - 1))

    def _trace(self) -> Trace:
        chunks = self._chunks()
        readers = [len(self._scored(*chunk)) for chunk in chunks]
        return tuple(
            Segment(end - start, after) for (start, end), after in zip(chunks, [*readers[1:], 0], strict=True)
        )
