"""Putting an engine together: what fits, what does not, and models shorter than the workspace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from apiary_server.engine.engine import Engine
from apiary_server.engine.result import FinishReason
from apiary_server.errors import ContextFull, InvalidField
from apiary_server.sessions.pool import Geometry, SlotLayout
from apiary_server.settings import Settings
from apiary_server.worker import assemble, build, load_model
from tests import tiny
from tests.server.driver import Reader, ask, create, request

MakeEngine = Callable[..., Engine]
POSITIONS = 160


@pytest.fixture(scope="module")
def short_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with fewer positions than a workspace would have entries."""
    directory = tmp_path_factory.mktemp("short")
    return tiny.save(directory, tiny.config(max_position_embeddings=POSITIONS))


@pytest.fixture
def short(make_engine: MakeEngine, short_model: Path) -> Callable[..., Engine]:
    def make(**settings: object) -> Engine:
        defaults: dict[str, object] = {"model": str(short_model), "workspace_entries": 4096, "slack": 16}
        return make_engine(start=False, **(defaults | settings))

    return make


def test_a_workspace_is_never_longer_than_the_model(short: Callable[..., Engine]) -> None:
    engine = short()
    assert engine.model.max_positions == POSITIONS
    geometry = Geometry(layers=2, kv_heads=2, head_dim=8, dtype=torch.float32)
    assert engine.capacity().workspace_bytes == SlotLayout.of_workspace(geometry, POSITIONS).bytes


@pytest.mark.parametrize("turns", [[161], [7, 153, 1], [144, 16, 17, 400]])
@pytest.mark.parametrize(
    "policy",
    [
        "buzz(sink=2,window=8,threshold=20,stride=5)",
        "buzz(sink=2,window=8,threshold=20,positions=original)",
        "buzz(sink=4,window=80,threshold=60)",  # bound 144 and slack 16: all the positions there are
        "buzz(sink=4,window=80,threshold=60,positions=original)",
        "buzz(sink=4,window=80,threshold=60,accumulate=false,positions=original)",
        "streaming(sink=4,window=140,block=1)",
        "streaming(sink=4,window=140,block=140,positions=original)",
        "h2o(heavy=72,recent=72,block=1,positions=original)",
    ],
)
def test_no_turn_ever_asks_for_a_position_that_is_not_there(
    short: Callable[..., Engine], policy: str, turns: list[int]
) -> None:
    engine = short()
    create(engine, "a", policy)
    create(engine, "b", policy)
    for id in ("a", "b"):
        for count in turns:
            reader = ask(engine, [5 + i % 250 for i in range(count)], id, max_tokens=12)
            assert reader.error is None
            assert engine.sessions.get("default", id).entries <= 144
    # the same again with a stop string of several tokens, so that the turn is computed twice
    free = ask(engine, [7] * 150, "a", max_tokens=40)
    stop = free.text[5:8]
    stopped = ask(engine, [7] * 150, "b", max_tokens=40, stop=(stop,))
    assert free.error is stopped.error is None
    assert stopped.text == free.text.partition(stop)[0]
    assert engine.sessions.get("default", "b").entries <= 144


@pytest.mark.parametrize("policy", ["full", f"full(bound={POSITIONS})", "full(bound=159,positions=original)"])
@pytest.mark.parametrize("first", [1, 30, 158])
def test_a_full_cache_ends_at_the_last_position(
    short: Callable[..., Engine], policy: str, first: int
) -> None:
    engine = short()
    create(engine, "a", policy)
    bound = engine.sessions.get("default", "a").bound
    reader = ask(engine, [5] * first, "a", max_tokens=1000)
    assert reader.error is None
    assert reader.deltas[-1].finish_reason is FinishReason.LENGTH
    info = engine.sessions.get("default", "a")
    assert info.entries == bound
    assert info.token_count == bound + 1  # the last was sampled and never fed back
    with pytest.raises(ContextFull, match=f"holds at most {bound}"):
        engine.open(request([5], "a"), Reader())
    with pytest.raises(ContextFull):
        engine.open(request([5] * (bound + 1), policy=policy), Reader())
    exact = ask(engine, [5] * bound, policy=policy, max_tokens=5)
    assert len(exact.token_ids) == 1


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        ("full(bound=161)", "160"),
        ("buzz(sink=4,window=80,threshold=61)", "with 16 of slack that is more than the 160 of a workspace"),
        ("buzz", "the bound must be less"),
        (
            "buzz(sink=4,window=20,threshold=20,kivi=4,residual=8)",
            "32 channels together, and the heads of this model have 8",
        ),
        ("nonsense", "unknown policy"),
        ("buzz(stride=2)", "stride=2"),
    ],
)
def test_policies_that_do_not_fit_the_model(short: Callable[..., Engine], policy: str, why: str) -> None:
    with pytest.raises(InvalidField, match=why) as refusal:
        short(policy=policy)
    assert [field for field, _ in refusal.value.violations] == ["policy"]
    engine = short()
    with pytest.raises(InvalidField, match=why):
        create(engine, "a", policy)
    with pytest.raises(InvalidField, match=why):
        engine.open(request("hi", policy=policy), Reader())


def test_a_budget_without_room_for_a_turn_is_refused_with_the_numbers(make_engine: MakeEngine) -> None:
    engine = make_engine(start=False)
    workspace, slot = engine.capacity().workspace_bytes, engine.capacity().slot_bytes
    least = workspace + 2 * slot
    with pytest.raises(ValueError, match=f"{least - 1:,} bytes is too small.*need {least:,}"):
        make_engine(start=False, cache_budget=least - 1)
    smallest = make_engine(start=False, cache_budget=least)
    create(smallest, "a")
    assert all(len(ask(smallest, [5] * 100, "a").token_ids) == 16 for _ in range(3))
    assert smallest.capacity().peak_bytes <= least


def test_a_default_policy_that_leaves_no_reserve_is_refused(make_engine: MakeEngine) -> None:
    engine = make_engine(start=False)
    least = engine.capacity().workspace_bytes + 2 * engine.capacity().slot_bytes
    with pytest.raises(InvalidField, match=r"needs 4 slots of .* bytes, .* together, and the"):
        make_engine(start=False, cache_budget=least, reserve_slots=3)


def test_a_session_whose_policy_is_too_large_for_the_budget_is_refused(make_engine: MakeEngine) -> None:
    engine = make_engine(start=False, cache_budget=2**19)
    with pytest.raises(InvalidField, match="the cache budget leaves"):
        create(engine, "a", "full(bound=1024)")


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta:x"])
def test_a_device_that_cannot_be_used_is_named(tiny_model: Path, device: str) -> None:
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used: "):
        build(Settings.load(model=str(tiny_model), device=device, threads=1))


def test_a_budget_beyond_the_machine_is_refused(make_engine: MakeEngine) -> None:
    with pytest.raises(ValueError, match=r"cpu has no .* bytes for the cache budget"):
        make_engine(start=False, cache_budget="4000000TiB")


def test_what_an_engine_says_of_its_model(make_engine: MakeEngine, tiny_model: Path) -> None:
    model = make_engine(
        start=False, model=f"{tiny_model}/", max_tokens=100, default_max_tokens=512, cache_dtype="bfloat16"
    ).model
    assert model.name == tiny_model.name
    assert (model.layers, model.query_heads, model.kv_heads, model.head_dim) == (2, 4, 2, 8)
    assert (model.vocab_size, model.max_positions, model.eos_token_ids) == (259, 1024, (2,))
    assert (model.weight_dtype, model.cache_dtype, model.chat) == ("float32", "bfloat16", True)
    assert (model.default_max_tokens, model.max_tokens) == (100, 100)
    assert model.default_policy == "buzz(sink=2,window=8,threshold=20,stride=5)"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("cache_dtype", ["float32", "bfloat16", "float16", "int8"])
def test_half_precision_runs(make_engine: MakeEngine, dtype: str, cache_dtype: str) -> None:
    engine = make_engine(start=False, dtype=dtype, cache_dtype=cache_dtype)
    create(engine, "a")
    for _ in range(3):
        reader = ask(engine, [5 + i for i in range(60)], "a", max_tokens=20)
        assert len(reader.token_ids) == 20
        assert reader.usage.evicted_entries > 0


def test_engines_over_one_loaded_model_answer_alike(tiny_model: Path) -> None:
    settings = Settings.load(model=str(tiny_model), policy="buzz(sink=2,window=8,threshold=20)", threads=1)
    loaded = load_model(settings)
    smaller = settings.model_copy(update={"cache_budget": 2**26})
    one, other = assemble(settings, loaded), assemble(smaller, loaded)
    assert (one.capacity().budget_bytes, other.capacity().budget_bytes) == (2**30, 2**26)
    answers = [
        ask(engine, "hello there", max_tokens=30).token_ids for engine in (one, other, build(settings))
    ]
    assert answers[0] == answers[1] == answers[2]
