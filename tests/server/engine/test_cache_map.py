"""Which tokens a cache keeps: as a cache of one's own has it, wherever the session's lies."""

from __future__ import annotations

import itertools
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from apiary_server import errors, worker
from apiary_server.engine.cache_map import CacheCopy, draw
from apiary_server.engine.engine import Engine
from apiary_server.engine.request import CacheMapRequest
from apiary_server.model.attention import Batch, ChunkRun, DecodeRun
from apiary_server.sessions.info import State
from apiary_server.sessions.parking import Parking, PinnedParking
from buzz import Buffers, Cache, Kind, parse
from tests import tiny
from tests.server.driver import Reader, ask, begin, create, request, run, same, session, state, step
from tests.server.sessions.test_parking import LateCopies

MakeEngine = Callable[..., Engine]
PROMPT = list(range(3, 153))
POLICIES = [
    "buzz(sink=2,window=8,threshold=20,stride=5)",
    "buzz(sink=2,window=8,threshold=20,stride=5,accumulate=false)",
    "buzz2(sink=2,window=8,hot=10,cells=10,block=4)",
    "cascade(sink=2,cascades=3,size=12,block=4)",
    "corm(budget=40,recent=8,queries=4,block=5)",
    "elastic(sink=3,heavy=25,recent=1,distance=5,block=4)",
    "full(bound=600)",
    "h2o(heavy=10,recent=10,block=4)",
    "streaming(sink=2,window=20,block=4)",
    "window(window=20,block=4)",
]


def look(engine: Engine, id: str) -> CacheCopy:
    copied = engine.keeper.look("default", id)
    step(engine)
    return copied.result(0)


def equal(one: CacheCopy, other: CacheCopy) -> bool:
    same = (one.score is None) == (other.score is None)
    if one.score is not None and other.score is not None:
        same = np.array_equal(one.score, other.score)
    counts = (one.policy, one.sampled, one.seen, one.tokens) == (
        other.policy,
        other.sampled,
        other.seen,
        other.tokens,
    )
    return same and counts and np.array_equal(one.position, other.position)


def segments(engine: Engine, id: str) -> Iterator[list[int]]:
    """The tokens that a session's cache has seen, prompt by prompt and else one by one."""
    record, start = session(engine, id), 0
    for end, prompt in record.segments:
        tokens = record.transcript[start:end].tolist()
        yield from [tokens] if prompt else ([token] for token in tokens)
        start = end


@torch.inference_mode()
def replayed(engine: Engine, policy: str, texts: Iterator[list[int]]) -> Cache:
    """The same tokens in a cache of its own memory, driven by the loop that buzz's README has."""
    chosen, layout = engine.sessions._layout(policy)
    shape, backend = layout.geometry, engine._loop.runner._backend
    size = (shape.layers, shape.kv_heads, 1000, shape.head_dim)
    cache = Cache(chosen, engine._door._rotary, Buffers.empty(*size, shape.dtype, "cpu", chosen.states))
    for tokens in texts:
        count, batch = len(tokens), Batch()
        cache.begin_segment(count)
        positions = torch.tensor(cache.next_positions(count))
        cache.prepare(count)
        rule, rows = (cache.states, chosen.log_n), slice(0, count)
        if count > 1:
            batch.chunks.append(ChunkRun(rows, cache.live, cache.n, cache.seen, *rule))
        else:
            live = cache.live
            one = Buffers(
                live.keys[None],
                live.values[None],
                live.position[None],
                {name: tensor[None] for name, tensor in live.state.items()},
            )
            counts = torch.tensor([cache.n]), torch.tensor([cache.seen])
            batch.decodes.append(DecodeRun(rows, one, *counts, cache.n + 1, *rule))
        backend.forward(torch.tensor(tokens), positions, torch.tensor([count - 1]), batch)
        cache.append(count)
        cache.end_segment()
    return cache


@pytest.mark.parametrize("policy", POLICIES)
def test_it_is_what_a_cache_of_its_own_keeps(make_engine: MakeEngine, policy: str) -> None:
    engine = make_engine(start=False)
    create(engine, "a", policy)
    for number in range(3):
        ask(engine, PROMPT[: 20 + 50 * number], "a", max_tokens=9 + 13 * number)
    copy = look(engine, "a")
    cache = replayed(engine, policy, segments(engine, "a"))
    assert (copy.sampled, copy.seen, copy.state) == (cache.sampled, cache.seen, State.RESIDENT)
    assert copy.tokens == session(engine, "a").transcript[: cache.seen]
    np.testing.assert_array_equal(copy.position, cache.buffers.position[:, :, : cache.n].numpy())
    assert cache.evicted or not cache.policy.evicts
    if cache.states:
        np.testing.assert_array_equal(copy.score, cache.buffers.state["score"][:, :, : cache.n].numpy())
    else:
        assert copy.score is None


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kivi", ["", ",kivi=4,residual=8"])
def test_what_is_parked_is_read_where_it_lies(
    tmp_path: Path, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, late: bool, kivi: str
) -> None:
    def pinned(device: torch.device, budget: int) -> Parking:
        return PinnedParking(budget, LateCopies())

    if late:
        monkeypatch.setattr(worker, "parking_of", pinned)
    model, policy = tiny.save(tmp_path, tiny.config(head_dim=32)), f"h2o(heavy=30,recent=20,block=4{kivi})"
    engine = make_engine(start=False, model=str(model), policy=policy)
    create(engine, "a")
    ask(engine, PROMPT, "a", max_tokens=25)
    resident = look(engine, "a")
    cache = session(engine, "a").cache
    assert cache is not None
    assert (cache.packed > 0) == bool(kivi)
    assert np.array_equal(resident.position, cache.buffers.position[:, :, : cache.n].numpy())
    number = 0
    while session(engine, "a").parked is None:
        create(engine, f"b{number}")
        ask(engine, "hello", f"b{number}")
        number += 1
    before, memory = engine.capacity(), session(engine, "a").parked
    parked = look(engine, "a")
    assert (resident.state, parked.state) == (State.RESIDENT, State.PARKED)
    assert equal(resident, parked)
    assert engine.capacity() == before
    assert session(engine, "a").parked is memory
    assert len(ask(engine, "go on", "a").token_ids) == 16


def test_nothing_changes(make_engine: MakeEngine) -> None:
    engine = make_engine(start=False)
    create(engine, "a")
    ask(engine, PROMPT, "a", max_tokens=25)
    before, expiry = state(session(engine, "a")), session(engine, "a").expire_time
    copy = look(engine, "a")
    assert same(before, state(session(engine, "a")))
    assert session(engine, "a").expire_time == expiry
    ask(engine, "go on", "a", max_tokens=40)
    after = look(engine, "a")
    assert not equal(copy, after), "the copy stays as it was"
    assert copy.tokens == after.tokens[: copy.seen]


def test_a_fork_has_the_same_map(make_engine: MakeEngine) -> None:
    engine = make_engine(start=False)
    create(engine, "a")
    ask(engine, PROMPT, "a", max_tokens=25)
    forked = engine.keeper.fork("default", "a", "b")
    step(engine)
    forked.result(0)
    assert equal(look(engine, "a"), look(engine, "b"))


def test_a_session_without_a_cache_has_a_map_without_entries(make_engine: MakeEngine) -> None:
    engine = make_engine(start=False)
    create(engine, "a")
    create(engine, "b", "streaming(sink=2,window=20)")
    for number in range(2):
        ask(engine, PROMPT, "b", max_tokens=5 + number)
    engine.keeper.rewind("default", "b", 1)
    for id, where in (("a", State.EMPTY), ("b", State.STORED)):
        copy = look(engine, id)
        assert (copy.state, copy.seen, copy.position.shape) == (where, 0, (2, 2, 0))
        for full in (False, True):
            drawn = engine.cache_map(copy, CacheMapRequest(full=full), 10**6)
            assert (drawn.entries, drawn.kept, len(drawn.layers)) == (0, 0, 2)
            assert [*drawn.regions, *drawn.columns, *drawn.tokens] == []
    assert session(engine, "b").lease is None


def test_busy_foreign_unknown_expired_and_deleted_sessions(make_engine: MakeEngine) -> None:
    engine = make_engine(start=False)
    create(engine, "a")
    ask(engine, PROMPT, "a")
    for tenant, id in (("other", "a"), ("default", "unknown")):
        with pytest.raises(errors.SessionNotFound):
            engine.keeper.look(tenant, id)
    reader = begin(engine, request("hello", "a"))
    step(engine)
    with pytest.raises(errors.SessionBusy):
        look(engine, "a")
    run(engine, reader)
    assert look(engine, "a").seen > len(PROMPT)
    copied = engine.keeper.look("default", "a")
    session(engine, "a").expire_time = time.time() - 1
    with pytest.raises(errors.SessionNotFound):
        engine.keeper.look("default", "a")
    step(engine)
    with pytest.raises(errors.SessionNotFound):
        copied.result(0)


def test_nobody_has_to_wait_for_a_look(make_engine: MakeEngine) -> None:
    engine = make_engine(start=False)
    create(engine, "a")
    ask(engine, PROMPT, "a")
    copied, reader = engine.keeper.look("default", "a"), Reader()
    assert engine.open(request("go on", "a"), reader).done(), "it holds no turn"
    run(engine, reader)
    with pytest.raises(errors.SessionBusy):
        copied.result(0)


# what is told of a copy


def a_copy(policy: str, shape: tuple[int, int, int], seen: int, scores: bool = True) -> CacheCopy:
    layers, kv_heads, n = shape
    random = np.random.default_rng(5)
    heads = [np.sort(random.choice(seen, n, replace=False)) for _ in range(layers * kv_heads)]
    position = np.array(heads, np.int32).reshape(shape)
    score = random.integers(0, 4, shape).astype(np.float32) if scores else None
    tokens = array("I", random.integers(0, 99, seen).tolist())
    return CacheCopy("a", parse(policy), State.RESIDENT, 5, seen, position, score, tokens)


def pieces(tokens: Sequence[int], places: Sequence[int]) -> list[str]:
    return [f"<{tokens[place]}>" for place in places]


@pytest.mark.parametrize("policy", ["buzz(sink=2,window=5,threshold=9)", "h2o(heavy=7,recent=4,block=1)"])
@pytest.mark.parametrize("scores", [True, False])
@pytest.mark.parametrize("layers", [(), (2,), (3, 0)])
@pytest.mark.parametrize(("seen", "columns"), [(40, 7), (12, 64), (300, 512)])
def test_counts_are_those_of_a_loop(
    policy: str, scores: bool, layers: tuple[int, ...], seen: int, columns: int
) -> None:
    copy = a_copy(policy, (4, 3, 11), seen, scores)
    drawn = draw(copy, CacheMapRequest(full=True, layers=layers, column_count=columns), pieces, 10**6)
    chosen = layers or (0, 1, 2, 3)
    kinds = [
        region.kind for region in copy.policy.regions(11, 5, seen) for _ in range(region.start, region.stop)
    ]
    entries = [
        (int(copy.position[at]), kinds[at[2]], 0.0 if copy.score is None else float(copy.score[at]))
        for at in itertools.product(chosen, range(3), range(11))
    ]
    assert (drawn.entries, drawn.kv_heads, drawn.seen) == (11, 3, seen)
    assert drawn.kept == len(drawn.tokens) == len({place for place, _, _ in entries})
    assert [token.position for token in drawn.tokens] == sorted({place for place, _, _ in entries})
    for token in drawn.tokens:
        mine = [entry for entry in entries if entry[0] == token.position]
        assert token.head_count == len(mine)
        assert set(token.kinds) == {kind for _, kind, _ in mine}
        assert len(token.kinds) == len(set(token.kinds))
        assert token.token_id == copy.tokens[token.position]
        assert token.text == f"<{token.token_id}>"
        mean = sum(score for _, _, score in mine) / len(mine)
        assert token.mean_score == (pytest.approx(mean) if scores else None)
    assert len(drawn.columns) == min(columns, seen)
    assert [column.start for column in drawn.columns] == [0, *(column.stop for column in drawn.columns[:-1])]
    assert drawn.columns[-1].stop == seen
    assert len({column.stop - column.start for column in drawn.columns}) <= 2
    for place, column in enumerate(drawn.columns):
        here = Counter(kind for at, kind, _ in entries if column.start <= at < column.stop)
        assert (column.kind is None) == (not here)
        assert column.kind is None or here[column.kind] == max(here.values())
        assert sum(int(layer.column_entries[place]) for layer in drawn.layers) == sum(here.values())
    for layer, number in zip(drawn.layers, chosen, strict=True):
        assert layer.layer == number
        assert layer.positions is not None
        assert np.array_equal(layer.positions, copy.position[number])
        assert (layer.scores is None) == (not scores)
        assert layer.scores is None or np.array_equal(layer.scores, copy.score[number])  # type: ignore[index]
        assert int(layer.column_entries.sum()) == 33


def test_a_summary_has_what_was_chosen_and_is_kept_most() -> None:
    copy = a_copy("h2o(heavy=7,recent=4,block=1)", (4, 3, 11), 40)
    whole = draw(copy, CacheMapRequest(full=True), pieces, 10**6)
    drawn = draw(copy, CacheMapRequest(token_limit=1000), pieces, 0)
    assert all(layer.positions is None and layer.scores is None for layer in drawn.layers)

    def rank(place: int) -> tuple[bool, int, float, int]:
        token = next(token for token in whole.tokens if token.position == place)
        assert token.mean_score is not None
        return (Kind.HEAVY not in token.kinds, -token.head_count, -token.mean_score, place)

    order = sorted((token.position for token in whole.tokens), key=rank)
    assert [token.position for token in drawn.tokens] == order
    assert sorted(drawn.tokens, key=lambda token: token.position) == whole.tokens
    few = draw(copy, CacheMapRequest(token_limit=5), pieces, 0)
    assert (few.tokens, few.kept) == (drawn.tokens[:5], drawn.kept)


def test_there_is_no_such_layer() -> None:
    copy = a_copy("streaming(sink=2,window=9)", (4, 3, 11), 40)
    with pytest.raises(errors.InvalidField) as caught:
        draw(copy, CacheMapRequest(layers=(3, 4, 9)), pieces, 10**6)
    assert caught.value.violations == [
        ("layers[1]", "is 4, and the model has the layers 0 to 3"),
        ("layers[2]", "is 9, and the model has the layers 0 to 3"),
    ]


def test_a_full_map_that_is_too_large_says_what_is_not() -> None:
    copy = a_copy("h2o(heavy=190,recent=10,block=1)", (4, 3, 200), 220)
    with pytest.raises(errors.InvalidField, match=r"4 layers with 2,400 entries .* name at most 2$"):
        draw(copy, CacheMapRequest(full=True), pieces, 33_000)
    assert draw(copy, CacheMapRequest(full=True, layers=(3, 1)), pieces, 33_000).entries == 200
    with pytest.raises(errors.InvalidField, match=r"take the summary$"):
        draw(copy, CacheMapRequest(full=True, layers=(1,)), pieces, 20_000)
    assert draw(copy, CacheMapRequest(), pieces, 20_000).entries == 200

    def long(tokens: Sequence[int], places: Sequence[int]) -> list[str]:
        return ["x" * 1000] * len(places)

    with pytest.raises(errors.InvalidField, match="at most 33,000"):
        draw(copy, CacheMapRequest(full=True, layers=(3, 1)), long, 33_000)
