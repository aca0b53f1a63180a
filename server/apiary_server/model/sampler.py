"""The next token of every row of a batch, vectorised over rows.

Randomness is counter-based (Philox, Salmon et al., SC 2011): the number that chooses a token is a function of
(seed, token index) alone, so it never depends on the batch. Every other operation works within a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from apiary_server.model.types import Sampling, TokenLogprob
from buzz import operators

_HEAD = 1024  # likeliest tokens that are put in order at first
_PART = 256  # tokens of the vocabulary whose maximum is taken together
_MOST = float(torch.finfo(torch.float32).max)


@dataclass(slots=True)
class Choice:
    """What one row asks for. `index` counts the tokens generated so far; `prompt` and `output` are the turn's
    token ids, which only penalties read."""

    sampling: Sampling
    seed: int
    index: int
    logprobs: int | None = None
    prompt: Sequence[int] = ()
    output: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Sampled:
    """One row's token; None where the logits were not finite, which is the model's failure."""

    token: int | None
    logprob: TokenLogprob | None = None


def uniform(seed: int, index: int) -> float:
    """The number in [0, 1) of this seed and token index, with 53 random bits."""
    raw = np.random.Philox(key=seed, counter=index).random_raw()
    return (int(raw) >> 11) * 2.0**-53


def sample(logits: Tensor, choices: Sequence[Choice]) -> list[Sampled]:
    """Choose one token per row.

    Args:
        logits: `[rows, vocab]`, any float dtype; not changed.
        choices: one per row.
    """
    raw = logits.float()
    tokens, largest = likeliest(raw)
    sound = torch.isfinite(largest).tolist()  # a NaN or +inf anywhere shows in the maximum
    logits = _penalise(raw, choices)
    if logits is not raw:
        tokens, _ = likeliest(logits)
    random = [row for row, choice in enumerate(choices) if choice.sampling.temperature > 0 and sound[row]]
    if random:
        rows = torch.tensor(random, device=logits.device)
        tokens[rows] = _draw(logits[rows], [choices[row] for row in random])
    chosen = tokens.tolist()
    logprobs = _logprobs(raw, chosen, choices)
    return [
        Sampled(token, logprobs.get(row)) if sound[row] else Sampled(None) for row, token in enumerate(chosen)
    ]


def likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The first of the largest of each row `[rows, vocab]`, NaN being larger than all, int64, and its value:
    `[rows]` each, by the operator `apiary::likeliest`."""
    tokens, largest = torch.ops.apiary.likeliest(logits)
    return tokens, largest


def default_likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """As `likeliest`.

    Torch's argmax looks at one number after the other, its maximum at many together; so the maximum of each
    part says in which part to look.
    """
    vocabulary = logits.shape[-1]
    whole = vocabulary // _PART * _PART
    largest = logits[:, :whole].unflatten(-1, (whole // _PART, _PART)).amax(dim=-1)
    if whole < vocabulary:
        largest = torch.cat([largest, logits[:, whole:].amax(dim=-1, keepdim=True)], dim=-1)
    start = largest.argmax(dim=-1, keepdim=True) * _PART
    ids = (start + torch.arange(_PART, device=logits.device)).clamp_(max=vocabulary - 1)
    part = logits.gather(-1, ids)
    place = part.argmax(dim=-1, keepdim=True)
    return ids.gather(-1, place).squeeze(-1), part.gather(-1, place).squeeze(-1)


operators.define("apiary::likeliest(Tensor logits) -> (Tensor, Tensor)", default_likeliest)


def _penalise(logits: Tensor, choices: Sequence[Choice]) -> Tensor:
    """Repetition (Keskar et al. 2019: prompt and answer), presence and frequency penalties (answer),
    biases."""
    changed = [
        row
        for row, choice in enumerate(choices)
        if choice.sampling.logit_bias
        or choice.sampling.repetition_penalty != 1
        or choice.sampling.presence_penalty
        or choice.sampling.frequency_penalty
    ]
    if not changed:
        return logits
    logits = logits.clone()
    for row in changed:
        choice, line = choices[row], logits[row]
        sampling = choice.sampling
        if sampling.repetition_penalty != 1:
            seen = torch.tensor(sorted({*choice.prompt, *choice.output}), device=line.device)
            if len(seen):
                old = line[seen].double()  # a tiny penalty would be 0 in float32
                penalty = sampling.repetition_penalty
                line[seen] = torch.where(old > 0, old / penalty, old * penalty).clamp(max=_MOST).float()
        if choice.output and (sampling.presence_penalty or sampling.frequency_penalty):
            output = torch.tensor(choice.output, device=line.device)
            used, counts = torch.unique(output, return_counts=True)
            line[used] -= sampling.presence_penalty + sampling.frequency_penalty * counts
        if sampling.logit_bias:
            biased = torch.tensor(list(sampling.logit_bias), device=line.device)
            line[biased] += torch.tensor(list(sampling.logit_bias.values()), device=line.device)
    return logits


def _draw(logits: Tensor, choices: Sequence[Choice]) -> Tensor:
    """Temperature, then top-k, top-p and min-p, each on what the one before left; then the inverse of the
    cumulative distribution, likeliest token first. Returns int64 `[rows]`.

    Nearly always the token is among the likeliest, and only these are put in order; rows where it is not, or
    where the rest could matter, are drawn again among all.
    """
    tokens, sure = _draw_among(logits, choices, min(_HEAD, logits.shape[-1]))
    for row in (~sure).nonzero().flatten().tolist():
        tokens[row] = _draw_among(logits[row : row + 1], choices[row : row + 1], logits.shape[-1])[0][0]
    return tokens


def _draw_among(logits: Tensor, choices: Sequence[Choice], head: int) -> tuple[Tensor, Tensor]:
    """Draw among the `head` likeliest tokens: the tokens, and whether all would have given the same.

    Sums are cumulative ones, whose rows do not depend on each other; `sum` of one row may use all threads.
    """

    def column(value: Callable[[Choice], float]) -> Tensor:
        return torch.tensor([value(c) for c in choices], dtype=torch.float64, device=logits.device)[:, None]

    vocabulary = logits.shape[-1]
    # in order of value, and of id among equals: topk alone leaves the order of equals open
    order = logits.topk(head, sorted=False).indices.sort(dim=-1).values
    ordered, place = logits.gather(-1, order).double().sort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, place)

    temperature, largest = column(lambda c: c.sampling.temperature), ordered[:, :1]
    top_k = column(lambda c: c.sampling.top_k or vocabulary)
    top_p, min_p = column(lambda c: c.sampling.top_p), column(lambda c: c.sampling.min_p)
    within = torch.arange(head, device=logits.device) < top_k
    # relative to the largest, since a tiny temperature would make all of them infinite
    weights = ((ordered - largest) / temperature).exp() * within
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]
    if head < vocabulary:
        whole = ((logits.double() - largest) / temperature).exp().cumsum(dim=-1)[:, -1:]
        total = torch.where(top_k <= head, total, whole)
    keep = within & ((cumulative - weights < top_p * total) | (top_p >= 1)) & (weights >= min_p)
    kept = (weights * keep).cumsum(dim=-1)
    # what is kept ends within the head; or nothing is dropped, so that its weight is known all the same
    ends = ~keep[:, -1:]
    known = ends & ((top_k <= head) | (top_k >= vocabulary) | (top_p >= 1))
    known |= (top_p >= 1) & (min_p == 0) & (top_k >= vocabulary)
    point = column(lambda c: uniform(c.seed, c.index)) * torch.where(ends, kept[:, -1:], total)
    if head == vocabulary:
        point = point.minimum(kept[:, -1:])
    place = torch.searchsorted(kept, point, right=True)
    inside = place < head
    place = place.clamp(max=head - 1)
    sure = known & inside & (ordered.gather(-1, place) > ordered[:, -1:])
    return order.gather(-1, place).squeeze(-1), sure.squeeze(-1) | (head == vocabulary)


def _logprobs(raw: Tensor, chosen: Sequence[int], choices: Sequence[Choice]) -> dict[int, TokenLogprob]:
    """Log-probabilities of the model's own distribution, for the rows that ask."""
    result = {}
    for row, choice in enumerate(choices):
        if choice.logprobs is None:
            continue
        line = torch.log_softmax(raw[row], dim=-1)
        values, ids = line.topk(min(choice.logprobs, line.shape[-1]))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        result[row] = TokenLogprob(chosen[row], float(line[chosen[row]]), top)
    return result
