"""What a session opens with stays in its cache, where its policy was asked to pin it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from apiary_server.engine.engine import Engine
from apiary_server.errors import InvalidField
from apiary_server.sessions.info import RebuildReason
from apiary_server.sessions.request import SessionChange
from buzz import Kind
from buzz.compaction import regions
from tests.server.driver import ask, begin, create, outcome, request, session, step

MakeEngine = Callable[..., Engine]
POLICY = "buzz(sink=2,window=8,threshold=40,pinned=system)"
SYSTEM = ("system", "Be brief.")


def positions(engine: Engine, id: str) -> list[list[int]]:
    """Of the entries of each layer and head."""
    cache = session(engine, id).cache
    assert cache is not None
    kept: list[list[int]] = cache.buffers.position[:, :, : cache.n].flatten(0, 1).tolist()
    return kept


def test_the_system_prompt_stays_whatever_comes(make_engine: MakeEngine) -> None:
    engine = make_engine(start=False)
    create(engine, "a", POLICY)
    ask(engine, [SYSTEM, ("user", "Hello!")], "a", max_tokens=30)
    pinned = session(engine, "a").policy.pins
    prompt = session(engine, "a").transcript[:pinned].tolist()
    said = engine._door.tokenizer.backend.decode(prompt, skip_special_tokens=False)
    assert said == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    for number in range(6):
        ask(engine, [("user", f"And {number}, at some length?")], "a", max_tokens=20)
    kept = positions(engine, "a")
    assert all(head[:pinned] == list(range(pinned)) for head in kept)
    cache, policy = session(engine, "a").cache, session(engine, "a").policy
    assert cache is not None
    assert cache.evicted > 100
    assert cache.n <= policy.bound == 50
    assert regions(policy, cache.n, cache.sampled, cache.seen)[0].kind is Kind.PINNED
    info = engine.sessions.get("default", "a")
    assert f"pinned={pinned})" in info.policy


@pytest.mark.parametrize("input", ["no chat at all, so nothing is before it", [40, 41, 42]])
def test_what_has_no_system_prompt_has_nothing_pinned(
    make_engine: MakeEngine, input: str | list[int]
) -> None:
    engine = make_engine(start=False)
    create(engine, "a", POLICY)
    ask(engine, input, "a", max_tokens=100)
    assert session(engine, "a").policy.pinned == 0
    assert session(engine, "a").cache.evicted  # type: ignore[union-attr]


def test_a_first_turn_that_was_cancelled_pins_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine(start=False)
    create(engine, "a", POLICY)
    reader = begin(engine, request([SYSTEM, ("user", "Hello!")], "a", max_tokens=99))
    step(engine, 20)
    reader.close()
    step(engine)
    assert session(engine, "a").policy.pinned == "system"
    ask(engine, [("system", "Be very, very brief."), ("user", "Hello!")], "a", max_tokens=2)
    alone = engine._door.tokenizer.backend.encode("<|im_start|>system\nBe very, very brief.<|im_end|>\n")
    assert session(engine, "a").policy.pins > len(alone.ids)


def test_a_system_prompt_that_leaves_no_room_is_refused(make_engine: MakeEngine) -> None:
    engine = make_engine(start=False)
    create(engine, "a", POLICY)
    with pytest.raises(InvalidField, match=r"the system prompt is too long: .* leaves 0 of a bound of 50"):
        begin(engine, request([("system", "word " * 30), ("user", "Hello!")], "a"))
    ask(engine, [SYSTEM, ("user", "Hello!")], "a", max_tokens=2)
    assert session(engine, "a").policy.pins


def test_it_is_found_out_by_the_first_turn_alone(make_engine: MakeEngine) -> None:
    engine = make_engine(start=False)
    create(engine, "a", POLICY.replace("system", "0"))
    ask(engine, [SYSTEM, ("user", "Hello!")], "a", max_tokens=30)
    with pytest.raises(InvalidField, match="say how many tokens, as pinned=40"):
        outcome(engine, engine.keeper.update("default", "a", SessionChange(policy=POLICY)))
    number = POLICY.replace("system", "13")
    outcome(engine, engine.keeper.update("default", "a", SessionChange(policy=number)))
    assert ask(engine, "more", "a", max_tokens=40).usage.rebuild_reason is RebuildReason.POLICY_CHANGED
    assert all(head[:13] == list(range(13)) for head in positions(engine, "a"))


def test_pins_outlive_the_worker(make_engine: MakeEngine, tmp_path: Path) -> None:
    calm = make_engine(start=False)
    first = make_engine(start=False, state_dir=tmp_path / "state")
    for engine in (calm, first):
        create(engine, "a", POLICY)
        ask(engine, [SYSTEM, ("user", "Hello!")], "a", max_tokens=60)
    for store in (first._journal, first._archive):
        assert store is not None
        store.close(10)
    second = make_engine(start=False, state_dir=tmp_path / "state")
    answers = [ask(engine, [("user", "Go on.")], "a", max_tokens=40) for engine in (calm, second)]
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[1].usage.rebuild_reason is None
    assert session(second, "a").policy == session(calm, "a").policy
    assert positions(second, "a") == positions(calm, "a")
