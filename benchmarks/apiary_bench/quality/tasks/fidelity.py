"""How far a policy's predictions are from the full cache's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apiary_bench.quality.bench import Bench, Budget
from apiary_bench.quality.ensemble import step
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
    together = 4
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

    def run(self, documents: Sequence[Prompt], targets: Sequence[float], bench: Bench) -> list[list[Outcome]]:
        readings = read(bench, [self.prompt(document) for document in documents], self.output, targets)
        kl, agree = (torch.zeros(len(readings), len(bench.contenders)) for _ in range(2))
        agree[:, 0] = 1
        others = range(1, len(bench.contenders))
        for place in range(self.output if others else 0):
            running = [i for i, each in enumerate(readings) if place < len(each.reference.tokens)]
            if not running:
                break
            tokens = [dict.fromkeys(others, readings[i].reference.tokens[place]) for i in running]
            behind = step([readings[i].ensemble for i in running], tokens)
            for i, logits in zip(running, behind, strict=True):
                reference = readings[i].reference
                expected, share = reference.logits[place], 1 / len(reference.tokens)
                kl[i, 1:] += share * divergence(expected, logits)
                agree[i, 1:] += share * (logits.argmax(dim=-1) == expected.argmax()).cpu()
        return [
            [
                Outcome.of(sized, sized.footprint, {"kl": float(kl[i, p]), "agreement": float(agree[i, p])})
                for p, sized in enumerate(reading.sized)
            ]
            for i, reading in enumerate(readings)
        ]


def divergence(expected: Tensor, logits: Tensor) -> Tensor:
    """KL in nats of the distribution of `expected` `[vocab]` from those of `logits` `[n, vocab]`: `[n]`."""
    p, q = expected.double().log_softmax(dim=-1), logits.double().log_softmax(dim=-1)
    return (p.exp() * (p - q)).sum(dim=-1).float().cpu()
