"""Every registered policy, at equal average bytes, and what its real cache holds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import buzz
from apiary_bench.quality.bench import Bench
from apiary_bench.quality.ensemble import Ensemble
from apiary_bench.quality.memory import (
    Segment,
    Trace,
    counts,
    footprint,
    generation,
    held_bytes,
    plain_bytes,
)
from apiary_bench.quality.sizing import TOLERANCE, fit
from apiary_server.sessions.pool import Geometry

GEOMETRY = Geometry(layers=30, kv_heads=3, head_dim=64, dtype=torch.float32)
STREAM: Trace = (*(Segment(64, 64 if i >= 15 else 0) for i in range(47)), Segment(64, 0))
ANSWER = generation(1300, 32)
EVICTING = [name for name in buzz.names() if name != "full"]


@pytest.mark.parametrize("trace", [STREAM, ANSWER], ids=["stream", "answer"])
@pytest.mark.parametrize("name", EVICTING)
def test_average_bytes_match(name: str, trace: Trace) -> None:
    sized = fit(buzz.parse(name), trace, 564, GEOMETRY, 8000)
    # of 1,300 tokens the paper's rule leaves 43% at the most or, where it is not yet due, all
    tolerance = 0.04 if name == "buzz" and trace is ANSWER else TOLERANCE
    assert sized.target_bytes == plain_bytes(564, GEOMETRY)
    assert sized.footprint.bytes == pytest.approx(sized.target_bytes, rel=tolerance)
    assert sized.footprint == footprint(sized.policy, trace, GEOMETRY)


def test_no_policy_matches_by_keeping_all_until_the_answer_begins() -> None:
    buzz_ = fit(buzz.parse("buzz"), ANSWER, 564, GEOMETRY, 8000)
    assert buzz_.policy.bound < 1300
    assert buzz_.footprint.highest <= 1.6 * plain_bytes(564, GEOMETRY)


def test_a_full_cache_is_not_scaled() -> None:
    full = buzz.parse("full").resolve(8192)
    sized = fit(full, generation(100, 3), 10, GEOMETRY, 8000)
    assert (sized.policy, sized.target_bytes, sized.footprint.entries) == (full, None, 101)


@pytest.mark.parametrize("prompt", [80, 120, 247])
@pytest.mark.parametrize("name", ["h2o", "buzz2"])
def test_a_prompt_may_be_shorter_than_the_residual(name: str, prompt: int) -> None:
    sized = fit(buzz.parse(f"{name}(kivi=4)"), generation(prompt, 60), prompt / 2.5, GEOMETRY, 8000)
    assert sized.footprint.bytes == pytest.approx(plain_bytes(prompt / 2.5, GEOMETRY), rel=TOLERANCE)


def test_quantised_entries_count_by_their_bytes_or_as_entries() -> None:
    policy = buzz.parse("streaming(kivi=4,residual=32)")
    by_bytes = fit(policy, STREAM, 200, GEOMETRY, 8000)
    by_entries = fit(policy, STREAM, 564, GEOMETRY, 8000, "entries")
    assert by_bytes.footprint.bytes == pytest.approx(plain_bytes(200, GEOMETRY), rel=TOLERANCE)
    assert by_bytes.footprint.entries > 600
    assert by_entries.footprint.entries == pytest.approx(564, rel=TOLERANCE)
    assert by_entries.footprint.bytes < 0.4 * plain_bytes(564, GEOMETRY)


def test_states_cost_four_bytes_each() -> None:
    plain, scored = (held_bytes(buzz.parse(name), 10, 0, GEOMETRY) for name in ("streaming", "h2o"))
    assert plain == 10 * 30 * 3 * (2 * 64 * 4 + 4)
    assert scored - plain == 10 * 30 * 3 * 4


def test_the_memory_that_unscored_tokens_see_does_not_count() -> None:
    trace = (Segment(10, 0), Segment(5, 3), Segment(5, 1))
    full = buzz.parse("full").resolve(8192)
    assert footprint(full, trace, GEOMETRY).entries == (3 * 15 + 20) / 4
    with pytest.raises(ValueError, match="scored"):
        footprint(full, (Segment(10, 0),), GEOMETRY)


@pytest.mark.parametrize("spec", [*EVICTING, "h2o(kivi=4,residual=32)"])
def test_counts_are_those_of_real_caches(spec: str, bench: Callable[..., Bench]) -> None:
    ours = bench(str(buzz.parse(spec).sized(120)))
    policy, trace = ours.policies[1], tuple(Segment(n, 1) for n in (200, 30, 30, 1, 1, 64, 64, 30))
    ensemble = Ensemble(ours.loaded, ours.policies, 500)
    ensemble.resize(ours.policies, 64)
    packed = 0
    for segment, (before, after) in zip(trace, counts(policy, trace), strict=True):
        ensemble.read(list(range(3, 3 + segment.tokens)))
        cache = ensemble.caches[1]
        assert cache.n == before
        ensemble.end()
        packed = policy.quantised(after, max(0, packed - (before - after)))
        assert (cache.n, cache.packed) == (after, packed)
    assert cache.evicted
