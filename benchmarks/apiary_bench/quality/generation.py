"""From a prompt to answers: what the tasks that generate have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from apiary_bench.quality.bench import Bench
from apiary_bench.quality.ensemble import Ensemble, step
from apiary_bench.quality.memory import generation
from apiary_bench.quality.sizing import Sized


@dataclass(frozen=True, slots=True)
class Continuation:
    """The full cache's own greedy continuation of a prompt.

    Attributes:
        tokens: at least one; the first may be a token that ends the answer, the others are not.
        logits: `[len(tokens), vocab]`, behind each of them.
    """

    tokens: list[int]
    logits: Tensor


@dataclass(frozen=True, slots=True)
class Reading:
    """A prompt that all policies have read and compacted, each in a cache of its own.

    Attributes:
        ensemble: the caches; the first is the full one, which holds the prompt alone.
        next: each policy's logits behind the prompt, `[vocab]`.
        reference: how the full cache goes on.
        sized: the policies as they run, matched over the prompt and a continuation of that length.
    """

    ensemble: Ensemble
    next: list[Tensor]
    reference: Continuation
    sized: list[Sized]


def read(
    bench: Bench,
    prompts: Sequence[Sequence[int]],
    output: int,
    targets: Sequence[float],
    slack: int = 1,
) -> list[Reading]:
    """Read prompts, each one segment and in one pass, and let the full caches go on together.

    Args:
        bench: the model and the policies; each is scaled for each prompt.
        prompts: token ids.
        output: the most tokens of a continuation.
        targets: average entries, for each prompt.
        slack: the most tokens that will be looked ahead.
    """
    ensembles, following = [], []
    for prompt in prompts:
        ensemble = Ensemble(bench.loaded, bench.policies, len(prompt) + max(output, slack))
        following.append([logits[0] for logits in ensemble.read(prompt, at=[len(prompt) - 1])])
        ensembles.append(ensemble)
    references = _continue(ensembles, [int(logits[0].argmax()) for logits in following], output)
    readings = []
    for prompt, entries, ensemble, next, reference in zip(
        prompts, targets, ensembles, following, references, strict=True
    ):
        sized = bench.sized(generation(len(prompt), len(reference.tokens)), entries)
        ensemble.resize([each.policy for each in sized], slack)
        ensemble.end(leave=True)
        readings.append(Reading(ensemble, next, reference, sized))
    return readings


def _continue(ensembles: Sequence[Ensemble], firsts: Sequence[int], most: int) -> list[Continuation]:
    stop = ensembles[0].loaded.eos_token_ids
    tokens = [[first] for first in firsts]
    logits: list[list[Tensor]] = [[] for _ in firsts]
    running = list(range(len(firsts)))
    for ahead in range(most):
        behind = step([ensembles[i] for i in running], [{0: tokens[i][-1]} for i in running], ahead)
        for i, (row,) in zip(running, behind, strict=True):
            logits[i].append(row)
        following = {i: int(logits[i][-1].argmax()) for i in running}
        running = [i for i in running if following[i] not in stop]
        if not running or ahead == most - 1:
            break
        for i in running:
            tokens[i].append(following[i])
    return [Continuation(ids, torch.stack(rows)) for ids, rows in zip(tokens, logits, strict=True)]


def answers(readings: Sequence[Reading], most: int) -> list[dict[int, list[int]]]:
    """What each policy answers to each prompt, the full cache included; nothing where it ends at once."""
    stop = readings[0].ensemble.loaded.eos_token_ids
    firsts = [
        {i: int(logits.argmax()) for i, logits in enumerate(reading.next) if i > 0} for reading in readings
    ]
    found = greedy([reading.ensemble for reading in readings], firsts, most)
    for reading, answer in zip(readings, found, strict=True):
        answer[0] = [token for token in reading.reference.tokens if token not in stop]
    return found


def greedy(
    ensembles: Sequence[Ensemble], firsts: Sequence[Mapping[int, int]], most: int, *, look: bool = False
) -> list[dict[int, list[int]]]:
    """Each policy's own likeliest tokens, until one that ends an answer.

    Args:
        ensembles: whose policies have left their trunks.
        firsts: for each ensemble by policy, its first token.
        most: tokens of an answer.
        look: only look ahead: the caches stay as they are. Else each token is a segment.

    Returns:
        For each ensemble by policy, tokens; those that end an answer are no part of it.
    """
    stop = ensembles[0].loaded.eos_token_ids
    found: list[dict[int, list[int]]] = [{i: [] for i in first} for first in firsts]
    running = [dict(first) for first in firsts]
    for ahead in range(most):
        running = [{i: token for i, token in tokens.items() if token not in stop} for tokens in running]
        for answer, tokens in zip(found, running, strict=True):
            for i, token in tokens.items():
                answer[i].append(token)
        if not any(running) or ahead == most - 1:
            break
        behind = step(ensembles, running, ahead if look else None)
        running = [
            dict(zip(tokens, logits.argmax(dim=-1).tolist(), strict=True))
            for tokens, logits in zip(running, behind, strict=True)
        ]
    return found


def surprise(logits: Tensor, tokens: Sequence[int]) -> float:
    """Mean negative log-likelihood of tokens in nats, from the logits `[tokens, vocab]` before each."""
    target = torch.tensor(list(tokens), device=logits.device)
    return float(cross_entropy(logits.float(), target))
