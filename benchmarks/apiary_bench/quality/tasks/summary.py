"""Summaries of news: ROUGE against a person's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from apiary_bench.quality import data as files
from apiary_bench.quality.bench import Bench, Budget
from apiary_bench.quality.generation import answers, read
from apiary_bench.quality.memory import footprint, generation
from apiary_bench.quality.sizing import Sized
from apiary_bench.quality.tasks.task import Metric, Outcome, Task
from apiary_server.model.types import Message, Messages

_ROUGE = {"rougeL": "ROUGE-L", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2"}


@dataclass(frozen=True, slots=True)
class Article:
    """A prompt, and the summary that a person wrote."""

    prompt: list[int] = field(repr=False)
    summary: str = field(repr=False)


@dataclass(frozen=True)
class Summary(Task[Article]):
    """The model is asked for a summary, greedily; scores are F-measures with stemming, 0 to 100.

    Memory is a part of the prompt's tokens and is averaged over the queries behind the prompt; each policy
    is matched for each document, over as many tokens as the full cache's answer has.

    Attributes:
        name: of the task.
        instruction: before the article.
        article, summary: the fields of a row.
        output: the most tokens of a summary.
    """

    name: str
    instruction: str
    article: str
    summary: str
    output: int
    limit: int
    files: tuple[str, ...]

    metrics = tuple(Metric(name, "higher", digits=2, relative=True) for name in _ROUGE.values())
    together = 4
    budget = frozenset({"ratio"})

    def documents(self, data: Path, bench: Bench, limit: int, seed: int) -> Sequence[Article]:
        found = []
        rows = files.rows(data, self.files[0], {self.article: str, self.summary: str})
        for place, row in islice(rows, limit):
            asked = f"{self.instruction}\n\n{row[self.article]}"
            message = Message(role="user", content=asked)
            prompt = bench.loaded.tokenizer.encode(Messages(messages=(message,)))
            bench.require_positions(place, len(prompt) + self.output)
            found.append(Article(prompt, row[self.summary]))
        return found

    def prompt(self, document: Article) -> Sequence[int]:
        return document.prompt

    def target(self, document: Article, budget: Budget) -> float:
        return len(document.prompt) / budget.ratio

    def run(
        self, documents: Sequence[Article], targets: Sequence[float], bench: Bench
    ) -> list[list[Outcome]]:
        readings = read(bench, [document.prompt for document in documents], self.output, targets)
        found = answers(readings, self.output)
        return [
            [self._outcome(document, sized, answer[i], bench) for i, sized in enumerate(reading.sized)]
            for document, reading, answer in zip(documents, readings, found, strict=True)
        ]

    def _outcome(self, document: Article, sized: Sized, answer: list[int], bench: Bench) -> Outcome:
        scores = _scorer().score(document.summary, bench.loaded.tokenizer.decode(answer))
        trace = generation(len(document.prompt), max(1, len(answer)))
        held = footprint(sized.policy, trace, bench.loaded.geometry)
        return Outcome.of(sized, held, {name: 100 * scores[key].fmeasure for key, name in _ROUGE.items()})


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # here, since it takes seconds

    return RougeScorer(list(_ROUGE), use_stemmer=True)


XSUM = Summary(
    name="xsum",
    instruction="Summarize the following news article in one sentence.",
    article="document",
    summary="summary",
    output=96,
    limit=60,
    files=("xsum.jsonl",),
)
CNN_DM = Summary(
    name="cnn_dm",
    instruction="Summarize the following news article in three short sentences.",
    article="article",
    summary="highlights",
    output=128,
    limit=50,
    files=("cnn_dm.jsonl",),
)
