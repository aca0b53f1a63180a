"""The sampler against a naive restatement, row by row, and against the distribution that it claims."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apiary_server.engine.request import Sampling
from apiary_server.model.sampler import Choice, _draw, _draw_among, default_likeliest, sample, uniform

VOCABULARY = 40
INF, NAN = float("inf"), float("nan")


def logits_of(seed: int, rows: int = 1, vocabulary: int = VOCABULARY, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # coarse values, so that ties are common
    return (torch.randn(rows, vocabulary, generator=generator) * scale * 4).round() / 4


def choice(seed: int = 0, index: int = 0, **fields: Any) -> Choice:
    extra = {name: fields.pop(name) for name in ("logprobs", "prompt", "output") if name in fields}
    return Choice(Sampling(**fields), seed, index, **extra)


def token(logits: torch.Tensor, one: Choice) -> int | None:
    return sample(logits.view(1, -1), [one])[0].token


def penalised(line: list[float], one: Choice) -> list[float]:
    """The documented penalties, a token at a time."""
    s, result = one.sampling, list(line)
    for id in range(len(line)):
        if id in one.prompt or id in one.output:
            over = result[id] > 0
            result[id] = result[id] / s.repetition_penalty if over else result[id] * s.repetition_penalty
        count = list(one.output).count(id)
        if count:
            result[id] -= s.presence_penalty + s.frequency_penalty * count
        result[id] += s.logit_bias.get(id, 0.0)
    return result


def distribution(line: list[float], one: Choice) -> dict[int, float]:
    """What a random row is drawn from: temperature, top-k, top-p, min-p, in this order, likeliest first."""
    s = one.sampling
    line = penalised(line, one)
    ranked = sorted(range(len(line)), key=lambda id: (-line[id], id))
    weights = [(id, math.exp((line[id] - line[ranked[0]]) / s.temperature)) for id in ranked]
    if s.top_k:
        weights = weights[: s.top_k]
    whole, kept, before = math.fsum(w for _, w in weights), [], 0.0
    for id, weight in weights:
        if s.top_p < 1 and before >= s.top_p * whole:
            break
        kept.append((id, weight))
        before += weight
    kept = [(id, weight) for id, weight in kept if weight >= s.min_p * kept[0][1]]
    whole = math.fsum(weight for _, weight in kept)
    return {id: weight / whole for id, weight in kept}


def drawn(probabilities: dict[int, float], at: float) -> tuple[int, float]:
    """The token at this point of the cumulative distribution, and how far the point is from an edge."""
    total, margin = 0.0, at
    for id, probability in probabilities.items():
        total += probability
        margin = min(margin, abs(at - total))
        if at < total:
            return id, margin
    return id, 0.0


samplings = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([1e-6, 0.1, 0.7, 1.0, 2.5, 10.0]),
        "top_k": st.sampled_from([0, 1, 2, 7, VOCABULARY, VOCABULARY + 1, 2**31 - 1]),
        "top_p": st.sampled_from([1e-12, 0.1, 0.5, 0.93, 1.0]),
        "min_p": st.sampled_from([0.0, 1e-9, 0.03, 0.4, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 0.5, 1.3, 10.0]),
        "presence_penalty": st.sampled_from([0.0, -2.0, 0.75]),
        "frequency_penalty": st.sampled_from([0.0, -2.0, 0.75]),
        "logit_bias": st.dictionaries(
            st.integers(0, VOCABULARY - 1), st.sampled_from([-100.0, -1.5, 2.25, 100.0]), max_size=4
        ),
    }
)
tokens = st.lists(st.integers(0, VOCABULARY - 1), max_size=12)


@settings(max_examples=150, deadline=None)
@given(samplings, tokens, tokens, st.integers(0, 2**64 - 1), st.integers(0, 2**31 - 1))
def test_agrees_with_the_naive_restatement(
    fields: dict[str, Any], prompt: list[int], output: list[int], seed: int, index: int
) -> None:
    one = choice(seed, index, prompt=prompt, output=output, **fields)
    logits = logits_of(seed % 1000)[0]
    probabilities = distribution(logits.tolist(), one)
    expected, margin = drawn(probabilities, uniform(seed, index))
    chosen = token(logits, one)
    assert chosen in probabilities
    assert chosen == expected or margin < 1e-5


@settings(max_examples=60, deadline=None)
@given(samplings, tokens, tokens)
def test_greedy_takes_the_first_of_the_largest_penalised(
    fields: dict[str, Any], prompt: list[int], output: list[int]
) -> None:
    one = choice(prompt=prompt, output=output, **fields | {"temperature": 0.0})
    logits = logits_of(len(prompt) * 100 + len(output))[0]
    line = penalised(logits.tolist(), one)
    chosen = token(logits, one)
    assert chosen is not None
    assert line[chosen] >= max(line) - 1e-4
    if line.count(max(line)) > 1 and line[chosen] == max(line):
        assert chosen == line.index(max(line))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(samplings, tokens, tokens), min_size=2, max_size=6), st.integers(0, 2**63))
def test_a_row_alone_equals_the_row_in_a_batch(rows: list[Any], seed: int) -> None:
    greedy = [choice(), choice(logprobs=3, prompt=[1, 2], repetition_penalty=2.0)]
    choices = [
        choice(seed + i, i, prompt=prompt, output=output, logprobs=i % 3 or None, **fields)
        for i, (fields, prompt, output) in enumerate(rows)
    ] + greedy
    logits = logits_of(seed % 997, len(choices))
    together = sample(logits, choices)
    for line, one, other in zip(logits, choices, together, strict=True):
        assert sample(line[None], [one]) == [other]


def test_a_row_of_a_real_vocabulary_does_not_depend_on_the_batch_or_its_threads() -> None:
    rows = 4
    logits = logits_of(5, rows, 50_000)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for index in range(5):
            choices = [choice(7 + row, index, temperature=3.0, top_p=0.97) for row in range(rows)]
            alone = [sample(line[None], [one])[0] for line, one in zip(logits, choices, strict=True)]
            assert sample(logits, choices) == alone
    finally:
        torch.set_num_threads(before)


def test_seed_and_index_alone_decide() -> None:
    logits = logits_of(3, scale=1.0)[0]
    hot = {"temperature": 10.0}
    drawn_twice = [[token(logits, choice(seed, index, **hot)) for index in range(50)] for seed in (1, 1, 2)]
    assert drawn_twice[0] == drawn_twice[1] != drawn_twice[2]
    assert len(set(drawn_twice[0])) > 10


def test_uniform_is_uniform_and_in_range() -> None:
    points = [uniform(seed, index) for seed in (0, 1, 2**64 - 1) for index in range(3000)]
    assert all(0 <= point < 1 for point in points)
    assert len(set(points)) == len(points)
    counts = Counter(int(point * 20) for point in points)
    assert chi_square(counts, dict.fromkeys(range(20), 1 / 20), len(points)) < 43.8  # 19 degrees, p = 0.001


def chi_square(counts: Counter[int], probabilities: dict[int, float], draws: int) -> float:
    return sum((counts[id] - draws * p) ** 2 / (draws * p) for id, p in probabilities.items())


@pytest.mark.parametrize(
    ("fields", "quantile"),  # of chi-square with as many degrees as tokens are left less one, at p = 0.001
    [
        ({"temperature": 1.0}, 24.32),
        ({"temperature": 2.0, "top_k": 4}, 16.27),
        ({"temperature": 1.5, "top_p": 0.9}, 24.32),
        ({"temperature": 1.0, "min_p": 0.2}, 24.32),
        ({"temperature": 1.0, "logit_bias": {0: 1.0, 7: -2.0}}, 24.32),
    ],
)
def test_draws_follow_the_distribution(fields: dict[str, Any], quantile: float) -> None:
    logits = torch.tensor([1.0, 0.5, 0.25, 0.0, 0.0, -0.5, -1.0, 2.0])
    draws = 4000
    choices = [choice(11, index, **fields) for index in range(draws)]
    sampled = sample(logits.expand(draws, -1), choices)
    counts = Counter(one.token for one in sampled if one.token is not None)
    probabilities = distribution(logits.tolist(), choices[0])
    assert set(counts) == set(probabilities)
    assert chi_square(counts, probabilities, draws) < quantile


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(
    "bad", [[NAN] * 5, [0, NAN, 1, 2, 3], [0, INF, 1, 2, 3], [-INF] * 5, [INF, -INF, 0, 0, 0]]
)
def test_a_row_that_is_not_finite_fails_alone(bad: list[float], temperature: float) -> None:
    good = [0.0, 1.0, 9.0, 2.0, -INF]
    biased = {"logit_bias": {1: 100.0}, "repetition_penalty": 2.0, "prompt": [0, 1]}
    choices = [
        choice(temperature=temperature, logprobs=2),
        choice(temperature=temperature, logprobs=2, **biased),
        choice(temperature=temperature, top_k=1, logprobs=2),
    ]
    sampled = sample(torch.tensor([bad, bad, good]), choices)
    assert [one.token for one in sampled] == [None, None, 2]
    assert sampled[0].logprob is None
    assert sampled[2].logprob is not None


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1e-6, 1.0, 10.0])
def test_a_masked_token_is_never_drawn(temperature: float) -> None:
    logits = torch.full((VOCABULARY,), -INF)
    logits[[3, 17]] = torch.tensor([0.0, -2.0])
    chosen = {token(logits, choice(5, index, temperature=temperature)) for index in range(100)}
    assert 3 in chosen
    assert chosen <= {3, 17}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    logits = logits_of(9)[0].to(dtype)
    before = logits.clone()
    one = choice(4, 2, temperature=1.0, top_p=0.9, prompt=[1, 2], repetition_penalty=1.5, logit_bias={3: 1.0})
    assert token(logits, one) == token(logits.float(), one)
    assert torch.equal(logits, before)


def test_extreme_temperatures() -> None:
    logits = logits_of(1)[0]
    logits[7] = logits.max() + 1
    for temperature in (5e-324, 1e-300, 1e-6):
        assert {token(logits, choice(1, i, temperature=temperature)) for i in range(20)} == {7}
    assert len({token(logits, choice(1, i, temperature=10.0)) for i in range(200)}) > VOCABULARY / 2


@pytest.mark.parametrize("penalty", [5e-324, 1e-300, 1e-45, 1e-6])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_tiny_repetition_penalty_prefers_what_was_said(penalty: float, temperature: float) -> None:
    logits = torch.tensor([1.0, 9.0, 0.5, -3.0, -INF])
    one = choice(temperature=temperature, repetition_penalty=penalty, prompt=[0, 3, 4])
    assert token(logits, one) == 0


def test_biases_overrule_the_model() -> None:
    logits = logits_of(2)[0]
    for temperature in (0.0, 1.0):
        assert token(logits, choice(temperature=temperature, logit_bias={5: 100.0})) == 5
        banned = choice(temperature=temperature, logit_bias=dict.fromkeys(range(1, VOCABULARY), -100.0))
        assert token(logits, banned) == 0


def test_ties_go_to_the_lower_id() -> None:
    flat = torch.zeros(VOCABULARY)
    assert token(flat, choice()) == 0
    assert {token(flat, choice(3, i, temperature=1.0, top_k=3)) for i in range(60)} == {0, 1, 2}
    assert {token(flat, choice(3, i, temperature=1.0, top_p=1e-9)) for i in range(60)} == {0}
    everything = {token(flat, choice(3, i, temperature=1.0, min_p=1.0)) for i in range(600)}
    assert everything == set(range(VOCABULARY))


@pytest.mark.parametrize("vocabulary", [1, 255, 256, 257, 1000])
def test_the_likeliest_are_where_torch_finds_them(vocabulary: int) -> None:
    logits = torch.randint(
        0, 5, (20, vocabulary), generator=torch.Generator().manual_seed(vocabulary)
    ).float()
    logits[0], logits[1, vocabulary // 2], logits[2, -1], logits[3] = -INF, INF, NAN, NAN
    tokens, largest = default_likeliest(logits)
    assert torch.equal(tokens, logits.argmax(dim=-1))
    torch.testing.assert_close(largest, logits.amax(dim=-1), rtol=0, atol=0, equal_nan=True)


def test_no_rows_have_no_tokens() -> None:
    assert sample(torch.empty(0, 1000), []) == []


def test_logprobs_are_of_the_models_own_distribution() -> None:
    logits = logits_of(6)[0]
    one = choice(1, 1, temperature=3.0, top_k=2, logit_bias={4: 50.0}, logprobs=5)
    sampled = sample(logits[None], [one])[0]
    assert sampled.token is not None
    assert sampled.logprob is not None
    expected = torch.log_softmax(logits.double(), dim=-1)
    assert sampled.logprob.token_id == sampled.token
    assert sampled.logprob.logprob == pytest.approx(float(expected[sampled.token]), abs=1e-5)
    assert [value for _, value in sampled.logprob.top] == pytest.approx(
        expected.topk(5).values.tolist(), abs=1e-5
    )
    for id, value in sampled.logprob.top:
        assert value == pytest.approx(float(expected[id]), abs=1e-5)


@pytest.mark.parametrize(("asked", "given"), [(None, None), (0, 0), (1, 1), (20, 7)])
def test_as_many_logprobs_as_asked_and_there_are(asked: int | None, given: int | None) -> None:
    sampled = sample(logits_of(0, vocabulary=7), [choice(logprobs=asked)])[0]
    assert (None if sampled.logprob is None else len(sampled.logprob.top)) == given


@pytest.mark.parametrize("seed", range(8))
def test_drawing_among_the_likeliest_gives_what_drawing_among_all_gives(seed: int) -> None:
    vocabulary, rows = 5000, 24
    logits = logits_of(seed, rows, vocabulary, scale=[0.5, 1.0, 3.0, 6.0][seed % 4])
    pick = torch.Generator().manual_seed(seed)

    def among(*values: float) -> float:
        return values[int(torch.randint(len(values), (), generator=pick))]

    choices = [
        choice(
            seed=row,
            index=seed,
            temperature=among(0.2, 0.7, 1.0, 10.0),
            top_k=int(among(0, 0, 1, 50, 1024, 1025, 2000, 6000)),
            top_p=among(1.0, 1.0, 0.99, 0.9, 0.5),
            min_p=among(0.0, 0.0, 0.05, 1.0),
        )
        for row in range(rows)
    ]
    assert torch.equal(_draw(logits, choices), _draw_among(logits, choices, vocabulary)[0])
