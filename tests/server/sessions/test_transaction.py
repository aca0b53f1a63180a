"""A turn over a quantised cache: whatever it quantised, going back gives what was before, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from apiary_server.engine.engine import Engine
from apiary_server.engine.result import FinishReason
from tests import tiny
from tests.server.driver import ask, begin, create, request, run, same, session, state, step

POLICIES = [
    "h2o(heavy=40,recent=40,block=8,kivi=4,residual=16)",
    "buzz(sink=2,window=8,threshold=70,kivi=2,residual=10)",
    "streaming(sink=2,window=78,block=4,kivi=4,residual=0,positions=original)",
    "full(bound=390,kivi=4,residual=16)",
]
TURNS = [(90, 20), (3, 70), (150, 5), (20, 12)]  # tokens of a prompt, and of its answer


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads wide enough to be quantised; few positions, so that sessions change over."""
    directory = tmp_path_factory.mktemp("wide")
    return tiny.save(directory, tiny.config(head_dim=32, max_position_embeddings=400))


@pytest.fixture
def make(make_engine: Callable[..., Engine], wide_model: Path) -> Callable[..., Engine]:
    def make(**settings: object) -> Engine:
        defaults: dict[str, object] = {"model": str(wide_model), "cache_budget": "8MiB"}
        return make_engine(start=False, **(defaults | settings))

    return make


def prompt(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 259, (count,), generator=generator).tolist()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_turn_that_ends_at_any_moment_leaves_nothing(make: Callable[..., Engine], policy: str) -> None:
    disturbed, calm = make(step_tokens=32), make(step_tokens=32)
    for engine in (disturbed, calm):
        create(engine, "a", policy)
    second_slots = most = 0
    for number, (count, tokens) in enumerate(TURNS):
        turn = request(prompt(count, number), "a", max_tokens=tokens)
        record, pool = session(disturbed, "a"), disturbed._loop.residency.pool
        before = state(record) | {"update_time": None}
        for moment in (1, 2, 4, 9, 30, 60):
            reader = begin(disturbed, turn)
            step(disturbed, moment)
            if reader.ended:  # it committed: nothing is left to cancel
                break
            second_slots += pool.leased_bytes > record.layout.bytes
            reader.close()
            step(disturbed)
            assert same(state(record) | {"update_time": None}, before)
            assert pool.leased_bytes == (record.layout.bytes if number else 0)
        else:
            reader = begin(disturbed, turn)
            run(disturbed, reader)
        assert reader.token_ids == ask(calm, prompt(count, number), "a", max_tokens=tokens).token_ids
        after = [state(session(engine, "a")) | {"update_time": None} for engine in (disturbed, calm)]
        assert same(*after), "a turn that was tried before came out otherwise"
        most = max(most, session(calm, "a").cache.packed)  # type: ignore[union-attr]
    assert most > 0
    assert second_slots > 2


@pytest.mark.parametrize("policy", POLICIES)
def test_the_scheduler_s_cuts_change_nothing(make: Callable[..., Engine], policy: str) -> None:
    engines = [make(step_tokens=step_tokens) for step_tokens in (7, 256)]
    answers = []
    for engine in engines:
        create(engine, "a", policy)
        readers = [
            ask(engine, prompt(count, seed), "a", max_tokens=tokens)
            for seed, (count, tokens) in enumerate(TURNS)
        ]
        answers.append([reader.token_ids for reader in readers])
    assert answers[0] == answers[1]
    one, other = (session(engine, "a").cache for engine in engines)
    assert one is not None
    assert other is not None
    assert one.state() == other.state()
    assert torch.equal(one.buffers.position[:, :, : one.n], other.buffers.position[:, :, : one.n])


@pytest.mark.parametrize("policy", POLICIES)
def test_a_stop_string_forgets_what_it_quantised(make: Callable[..., Engine], policy: str) -> None:
    engine = make()
    for id in ("free", "stopped", "told"):
        create(engine, id, policy)
        ask(engine, prompt(100), id, max_tokens=30)
    free = ask(engine, prompt(10, 1), "free", max_tokens=60)
    assert free.error is None
    stop = free.text[40:43]
    stopped = ask(engine, prompt(10, 1), "stopped", max_tokens=60, stop=(stop,))
    assert stopped.text == free.text.partition(stop)[0]
    told = ask(engine, prompt(10, 1), "told", max_tokens=len(stopped.token_ids))
    assert told.token_ids == stopped.token_ids
    counts = [session(engine, id).cache.state() for id in ("stopped", "told")]  # type: ignore[union-attr]
    # a token that was sampled last is not in the cache; the one before a stop string is
    assert counts[0].seen - counts[1].seen in (0, 1)
    assert counts[0].measured


def test_a_full_cache_longer_than_the_workspace_takes_a_prompt_in_parts(make: Callable[..., Engine]) -> None:
    engine = make(workspace_entries=128)
    create(engine, "a", "full(bound=390,kivi=4,residual=16)")
    reader = ask(engine, prompt(300), "a", max_tokens=1000)
    assert reader.deltas[-1].finish_reason is FinishReason.LENGTH
    cache = session(engine, "a").cache
    assert cache is not None
    assert (cache.n, cache.evicted) == (390, 0)
    assert 16 <= cache.n - cache.packed < 16 + 32


def test_a_parked_session_comes_back_as_it_was(make: Callable[..., Engine]) -> None:
    policy = POLICIES[0]
    roomy, tight = make(policy=policy), make(policy=policy, cache_budget=600_000)
    answers: list[list[list[int]]] = [[], []]
    for engine, found in zip((roomy, tight), answers, strict=True):
        for id in "abcdefgh":
            create(engine, id)
        for turn in range(2):
            found += [ask(engine, prompt(60, turn), id, max_tokens=20).token_ids for id in "abcdefgh"]
    assert tight.capacity().parked_sessions > 0 == roomy.capacity().parked_sessions
    assert answers[0] == answers[1]
