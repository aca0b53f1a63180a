"""How far a policy's predictions are from the full cache's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apiary_bench.quality.bench import Bench, Budget
from apiary_bench.quality.generation import read
from apiary_bench.quality.tasks.qa10 import QA10
from apiary_bench.quality.tasks.summary import CNN_DM, XSUM
from apiary_bench.quality.tasks.task import Metric, Outcome, Task


@dataclass(frozen=True, slots=True)
class Prompt:
    """A document of another task."""

    source: Task[Any]
    document: Any = field(repr=False)


@dataclass(frozen=True)
class Fidelity(Task[Prompt]):
    """The full cache's own greedy continuation of other tasks' prompts is fed to every policy.

    `kl` is the mean over its tokens of KL(full || policy) in nats, of the predictions behind each token;
    `agreement`, how often both predict the same token. The continuation ends where the full cache ends its
    answer. Prompts come from the sources in turn and have their memory: entries for `qa10`, a ratio for
    summaries.

    Attributes:
        output: the most tokens of a continuation.
        sources: tasks.
    """

    output: int = 64
    sources: tuple[Task[Any], ...] = (QA10(), XSUM, CNN_DM)

    name = "fidelity"
    metrics = (Metric("kl", "lower", digits=4), Metric("agreement", "higher"))
    limit = 72
    files = ("qa10.jsonl", "xsum.jsonl", "cnn_dm.jsonl")
    budget = frozenset({"entries", "ratio"})

    def documents(self, data: Path, bench: Bench, limit: int, seed: int) -> Sequence[Prompt]:
        each = -(-limit // len(self.sources))
        lists = [
            [Prompt(source, document) for document in source.documents(data, bench, each, seed)]
            for source in self.sources
        ]
        turns = max(map(len, lists))
        return [prompts[turn] for turn in range(turns) for prompts in lists if turn < len(prompts)][:limit]

    def prompt(self, document: Prompt) -> Sequence[int]:
        return document.source.prompt(document.document)

    def target(self, document: Prompt, budget: Budget) -> float:
        return document.source.target(document.document, budget)

    def run(self, document: Prompt, target: float, bench: Bench) -> list[Outcome]:
        reading = read(bench, self.prompt(document), self.output, target)
        others = range(1, len(reading.sized))
        kl = torch.zeros(len(reading.sized))
        agree = torch.zeros(len(reading.sized))
        agree[0] = len(reading.reference.tokens)
        for token, expected in zip(reading.reference.tokens, reading.reference.logits, strict=True):
            if others:
                logits = reading.ensemble.step(dict.fromkeys(others, token))
                kl[1:] += divergence(expected, logits)
                agree[1:] += logits.argmax(dim=-1) == expected.argmax()
        count = len(reading.reference.tokens)
        return [
            Outcome.of(sized, sized.footprint, {"kl": float(k) / count, "agreement": float(a) / count})
            for sized, k, a in zip(reading.sized, kl, agree, strict=True)
        ]


def divergence(expected: Tensor, logits: Tensor) -> Tensor:
    """KL in nats of the distribution of `expected` `[vocab]` from those of `logits` `[n, vocab]`: `[n]`."""
    p, q = expected.double().log_softmax(dim=-1), logits.double().log_softmax(dim=-1)
    return (p.exp() * (p - q)).sum(dim=-1).float().cpu()
