"""From a prompt to answers: what the tasks that generate have in common."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from apiary_bench.quality.bench import Bench
from apiary_bench.quality.ensemble import Ensemble
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


def read(bench: Bench, prompt: Sequence[int], output: int, entries: float, slack: int = 1) -> Reading:
    """Read a prompt, one segment, in one pass.

    Args:
        bench: the model and the policies; each is scaled for this prompt.
        prompt: token ids.
        output: the most tokens of a continuation.
        entries: the target.
        slack: the most tokens that will be looked ahead.
    """
    ensemble = Ensemble(bench.loaded, bench.policies, len(prompt) + max(output, slack))
    following = [logits[0] for logits in ensemble.read(prompt, at=[len(prompt) - 1])]
    stop = bench.loaded.eos_token_ids
    reference = _continue(ensemble, int(following[0].argmax()), output, stop)
    sized = bench.sized(generation(len(prompt), len(reference.tokens)), entries)
    ensemble.resize([each.policy for each in sized], slack)
    ensemble.end(leave=True)
    return Reading(ensemble, following, reference, sized)


def _continue(ensemble: Ensemble, first: int, most: int, stop: Collection[int]) -> Continuation:
    tokens, logits = [first], []
    while True:
        logits.append(ensemble.step({0: tokens[-1]}, ahead=len(tokens) - 1)[0])
        following = int(logits[-1].argmax())
        if len(tokens) == most or following in stop:
            return Continuation(tokens, torch.stack(logits))
        tokens.append(following)


def greedy(
    ensemble: Ensemble, first: Mapping[int, int], most: int, stop: Collection[int], *, look: bool = False
) -> dict[int, list[int]]:
    """Each policy's own likeliest tokens, until one that stops.

    Args:
        ensemble: policies that have left their trunk.
        first: by policy, its first token.
        most: tokens of an answer.
        stop: tokens that end an answer and are no part of it.
        look: only look ahead: the caches stay as they are. Else each token is a segment.
    """
    answers: dict[int, list[int]] = {i: [] for i in first}
    running = dict(first)
    for ahead in range(most):
        running = {i: token for i, token in running.items() if token not in stop}
        for i, token in running.items():
            answers[i].append(token)
        if not running or ahead == most - 1:
            break
        logits = ensemble.step(running, ahead if look else None)
        running = dict(zip(running, logits.argmax(dim=-1).tolist(), strict=True))
    return answers


def surprise(logits: Tensor, tokens: Sequence[int]) -> float:
    """Mean negative log-likelihood of tokens in nats, from the logits `[tokens, vocab]` before each."""
    target = torch.tensor(list(tokens), device=logits.device)
    return float(cross_entropy(logits.float(), target))
