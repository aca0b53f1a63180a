"""Questions about one of ten documents (Lost in the Middle, https://arxiv.org/abs/2307.03172)."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch

from apiary_bench.quality import data as files
from apiary_bench.quality.bench import Bench, Budget
from apiary_bench.quality.generation import Reading, answers, read, surprise
from apiary_bench.quality.memory import footprint, generation
from apiary_bench.quality.tasks.task import Metric, Outcome, Task
from apiary_server.model.types import Message, Messages, Text

_INSTRUCTION = (
    "Answer the question with a few words, using only the given documents "
    "(some of which might be irrelevant)."
)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt with its documents and question, and the accepted answers."""

    prompt: list[int] = field(repr=False)
    answers: list[str] = field(repr=False)
    answer_ids: list[list[int]] = field(repr=False)


@dataclass(frozen=True)
class QA10(Task[Question]):
    """Ten documents, then the question; a short greedy answer.

    `match` is 1 where an accepted answer is part of the output, both in lower case without punctuation and
    articles. `answer_nll` is the mean negative log-likelihood per token, in nats, of the likeliest accepted
    answer, fed as one stretch behind the prompt. Memory is averaged over the queries behind the prompt; each
    policy is matched for each document, over as many tokens as the full cache's answer has.

    Attributes:
        output: the most tokens of an answer.
    """

    output: int = 32

    name = "qa10"
    metrics = (Metric("match", "higher"), Metric("answer_nll", "lower"))
    limit = 60
    together = 4
    files = ("qa10.jsonl",)
    budget = frozenset({"entries"})

    def documents(self, data: Path, bench: Bench, limit: int, seed: int) -> Sequence[Question]:
        fields: dict[str, type] = {"question": str, "answers": list, "documents": list}
        found = []
        for place, row in islice(files.rows(data, self.files[0], fields), limit):
            for answer in row["answers"]:
                files.check(place, "answers", answer, str)
            parts = [_INSTRUCTION]
            for number, document in enumerate(row["documents"], 1):
                files.check(place, "documents", document, dict)
                for key in ("title", "text"):
                    files.check(place, key, document.get(key), str)
                parts.append(f"Document [{number}] (Title: {document['title']}) {document['text']}")
            parts.append(f"Question: {row['question']}")
            message = Message(role="user", content="\n\n".join(parts))
            tokenizer = bench.loaded.tokenizer
            prompt = tokenizer.encode(Messages(messages=(message,)))
            accepted = list(dict.fromkeys(row["answers"]))
            ids = [tokenizer.encode(Text(text=answer), first=False) for answer in accepted]
            bench.require_positions(place, len(prompt) + max(self.output, *map(len, ids)))
            found.append(Question(prompt, accepted, ids))
        return found

    def prompt(self, document: Question) -> Sequence[int]:
        return document.prompt

    def target(self, document: Question, budget: Budget) -> float:
        return budget.entries

    def run(
        self, documents: Sequence[Question], targets: Sequence[float], bench: Bench
    ) -> list[list[Outcome]]:
        longest = max(len(ids) for document in documents for ids in document.answer_ids)
        prompts = [document.prompt for document in documents]
        readings = read(bench, prompts, self.output, targets, slack=longest)
        surprises = [_surprises(*each) for each in zip(documents, readings, strict=True)]
        outcomes = []
        for document, reading, nll, answer in zip(
            documents, readings, surprises, answers(readings, self.output), strict=True
        ):
            row = []
            for i, sized in enumerate(reading.sized):
                output = bench.loaded.tokenizer.decode(answer[i])
                scores = {"match": float(matches(output, document.answers)), "answer_nll": nll[i]}
                trace = generation(len(document.prompt), max(1, len(answer[i])))
                held = footprint(sized.policy, trace, bench.loaded.geometry)
                row.append(Outcome.of(sized, held, scores))
            outcomes.append(row)
        return outcomes


def _surprises(document: Question, reading: Reading) -> list[float]:
    """For each policy that of the likeliest accepted answer."""
    looked = reading.ensemble.look([ids[:-1] for ids in document.answer_ids])
    return [
        min(
            surprise(torch.cat([first[None], rest]), ids)
            for ids, rest in zip(document.answer_ids, behind, strict=True)
        )
        for first, behind in zip(reading.next, looked, strict=True)
    ]


def matches(output: str, accepted: Sequence[str]) -> bool:
    """Whether an accepted answer is part of the output, both normalised."""
    return any(normalise(answer) in normalise(output) for answer in accepted if normalise(answer))


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and runs of space (as SQuAD's evaluation does)."""
    plain = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", plain).split())
