"""Sessions that go from one worker to another: as they were, or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from apiary_server import errors
from apiary_server.engine.engine import Engine
from apiary_server.sessions.info import RebuildReason, State
from apiary_server.sessions.portable import pack
from apiary_server.sessions.request import SessionChange
from apiary_server.sessions.snapshot import decode, encode
from tests.server.driver import Reader, create, request, session

MakeEngine = Callable[..., Engine]
PROMPT = list(range(3, 153))
POLICY = "buzz(sink=2,window=8,threshold=20)"


def ask(engine: Engine, prompt: Any, id: str, **fields: Any) -> Reader:
    """Run one turn of an engine that runs by itself."""
    reader = Reader()
    engine.open(request(prompt, id, **fields), reader).result(10)
    for _ in range(500):
        if reader.ended:
            return reader
        threading.Event().wait(0.01)
    raise AssertionError("no end came")


def taken_out(engine: Engine, id: str = "a") -> bytes:
    return b"".join(engine.porter.take_out("default", id).result(10))


def talked(engine: Engine, policy: str = POLICY) -> Engine:
    """Two turns and a label."""
    create(engine, "a", policy, labels={"of": "bees"})
    ask(engine, PROMPT, "a", request_id="first")
    ask(engine, "and more", "a")
    return engine


@pytest.mark.parametrize("policy", [POLICY, "full(bound=900)", "corm(budget=40,recent=8,queries=8)"])
def test_a_session_goes_on_elsewhere(make_engine: MakeEngine, policy: str) -> None:
    one, other = talked(make_engine(), policy), make_engine()
    info = other.porter.take_in("somebody", "b", taken_out(one)).result(10)
    before = one.sessions.get("default", "a")
    assert (info.id, info.policy, info.turn_count, info.token_count, info.entries, dict(info.labels)) == (
        "b",
        before.policy,
        2,
        before.token_count,
        before.entries,
        {"of": "bees"},
    )
    assert info.state is State.RESIDENT
    here = ask(one, "go on", "a", max_tokens=40)
    there = ask(other, "go on", "b", max_tokens=40, tenant="somebody")
    assert there.token_ids == here.token_ids
    assert there.usage.rebuild_reason is None
    assert there.usage.cached_tokens == here.usage.cached_tokens


def test_a_repeated_request_is_answered_there_too(make_engine: MakeEngine) -> None:
    one, other = talked(make_engine()), make_engine()
    other.porter.take_in("default", "a", taken_out(one)).result(10)
    again = ask(other, PROMPT, "a", request_id="first")
    assert other.sessions.get("default", "a").turn_count == 2
    assert len(again.token_ids) == 16


def test_what_has_no_cache_goes_without(make_engine: MakeEngine, tmp_path: Path) -> None:
    one, other = make_engine(), make_engine()
    create(one, "empty")
    assert other.porter.take_in("default", None, taken_out(one, "empty")).result(10).state is State.EMPTY
    talked(one)
    one.keeper.rewind("default", "a", 1).result(10)
    info = other.porter.take_in("default", "a", taken_out(one)).result(10)
    assert (info.state, info.turn_count) == (State.STORED, 1)
    assert ask(other, "go on", "a").usage.rebuild_reason is RebuildReason.RESTARTED


def test_a_stored_cache_is_brought_and_taken_along(make_engine: MakeEngine, tmp_path: Path) -> None:
    one = talked(make_engine(state_dir=tmp_path / "state"))
    one.stop(grace=1)
    again = make_engine(state_dir=tmp_path / "state")
    other = make_engine()
    assert other.porter.take_in("default", "a", taken_out(again)).result(10).state is State.RESIDENT


def test_a_model_that_is_computed_otherwise_computes_anew(make_engine: MakeEngine) -> None:
    one, other = talked(make_engine()), make_engine(dtype="bfloat16")
    info = other.porter.take_in("default", "a", taken_out(one)).result(10)
    assert info.state is State.STORED
    assert ask(other, "go on", "a").usage.rebuild_reason is RebuildReason.MODEL_CHANGED


def test_names_that_are_taken_and_tables_that_are_full(make_engine: MakeEngine) -> None:
    one, other = talked(make_engine()), make_engine(max_sessions=1)
    data = taken_out(one)
    with pytest.raises(errors.SessionExists):
        one.porter.take_in("default", "a", data).result(10)
    other.porter.take_in("default", "a", data).result(10)
    with pytest.raises(errors.BudgetExhausted):
        other.porter.take_in("default", "b", data).result(10)
    assert len(other.sessions) == 1


def test_no_room_leaves_nothing(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apiary_server.engine.restorer._PATIENCE", 0.1)
    one = talked(make_engine())
    data = taken_out(one)
    other = make_engine(cache_budget=86_144 + 2 * 14_080, parked_budget=0)
    talked(other)
    with pytest.raises(errors.BudgetExhausted):
        other.porter.take_in("default", "b", data).result(10)
    with pytest.raises(errors.SessionNotFound):
        other.sessions.get("default", "b")
    other.keeper.delete("default", "a").result(10)
    other.porter.take_in("default", "b", data).result(10)


def test_busy_foreign_and_unknown_sessions_stay(make_engine: MakeEngine) -> None:
    engine = talked(make_engine())
    reader = Reader()
    engine.open(request("wait", "a", max_tokens=3000), reader).result(10)
    with pytest.raises(errors.SessionBusy):
        engine.porter.take_out("default", "a")
    reader.close()
    for tenant, id in (("somebody", "a"), ("default", "b")):
        with pytest.raises(errors.SessionNotFound):
            engine.porter.take_out(tenant, id)


def test_keys_must_agree(make_engine: MakeEngine, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("0123456789abcdef")
    (tmp_path / "other").write_text("fedcba9876543210")
    plain = talked(make_engine())
    signed = talked(make_engine(snapshot_key_file=tmp_path / "key"))
    other = make_engine(snapshot_key_file=tmp_path / "other")
    same = make_engine(snapshot_key_file=tmp_path / "key")
    for data, engine in ((taken_out(plain), same), (taken_out(signed), other), (taken_out(signed), plain)):
        with pytest.raises(errors.SnapshotRefused):
            engine.porter.take_in("default", "b", data).result(10)
    assert same.porter.take_in("default", "b", taken_out(signed)).result(10).turn_count == 2


def test_the_length_is_told_by_the_first_bytes(make_engine: MakeEngine) -> None:
    engine = talked(make_engine())
    data = taken_out(engine)
    told = [engine.porter.length(data[:count]) for count in range(0, 3000, 50)]
    assert told[0] is None
    assert told[-1] == len(data)
    with pytest.raises(errors.SnapshotRefused):
        engine.porter.length(b"something else that is long enough")


def test_damage_is_refused(make_engine: MakeEngine) -> None:
    engine = talked(make_engine())
    data, rng = taken_out(engine), random.Random(5)
    for _ in range(300):
        broken = bytearray(data)
        broken[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        with pytest.raises(errors.SnapshotRefused):
            engine.porter.take_in("default", "b", bytes(broken)).result(10)
    for length in (0, 10, 500, len(data) - 1):
        with pytest.raises(errors.SnapshotRefused):
            engine.porter.take_in("default", "b", data[:length]).result(10)
    assert len(engine.sessions) == 1


def _record(data: dict[str, torch.Tensor], **changes: Any) -> None:
    record = json.loads(data["record"].numpy().tobytes()) | changes
    text = json.dumps(record).encode()
    data["record"] = torch.from_numpy(np.frombuffer(text, np.uint8).copy())


def _turn(data: dict[str, torch.Tensor], **changes: Any) -> None:
    record = json.loads(data["record"].numpy().tobytes())
    _record(data, turns=[record["turns"][0] | changes, *record["turns"][1:]])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: t.pop("record"), "no session"),
        (lambda t: t.pop("transcript"), "no session"),
        (lambda t: t.update(transcript=t["transcript"][:-1].clone()), "its turns have"),
        (lambda t: _record(t, turns=[]), "its turns have"),
        (lambda t: _record(t, more=1), "malformed"),
        (lambda t: _record(t, labels={"": "x"}), "malformed"),
        (lambda t: _record(t, ttl=None, expire_time=5.0), "expired"),
        (lambda t: _record(t, ttl=None, expire_time=1e300), "expired"),
        (lambda t: _turn(t, seen=3), "not one of a turn"),
        (lambda t: _turn(t, seen=1000), "not one of a turn"),
        (lambda t: _turn(t, prompt_tokens=0), "malformed"),
        (lambda t: _turn(t, prompt_tokens=-5), "malformed"),
        (lambda t: _turn(t, finish="whenever"), "malformed"),
        (lambda t: _turn(t, chat=True), None),
        (lambda t: _turn(t, seed=-1), "malformed"),
        (lambda t: t["transcript"].fill_(-1), "vocabulary"),
        (lambda t: t["transcript"].fill_(10**6), "vocabulary"),
        (lambda t: t["position"].fill_(10**6), "positions beyond"),
        (lambda t: t.pop("keys"), "tensors"),
    ],
)
def test_whoever_has_the_key_cannot_harm(
    make_engine: MakeEngine, change: Callable[[dict[str, torch.Tensor]], object], why: str | None
) -> None:
    """Files that are sealed well and make no sense."""
    engine = talked(make_engine())
    _, tensors = decode(taken_out(engine), engine.porter._origin)
    change(tensors)
    stored, image = engine.keeper.copy("default", "a").result(10)
    bare = dataclasses.replace(image, state=None)
    parts = encode(bare, engine.porter._origin, tensors)
    manifest, _ = decode(b"".join(parts), engine.porter._origin)
    assert manifest.counts is None, "so the cache is not looked at, but for those cases"
    sealed = _sealed(engine, image, tensors) if why in ("positions beyond", "tensors") else b"".join(parts)
    taken = engine.porter.take_in("default", "b", sealed)
    if why is None:
        assert taken.result(10).turn_count == len(stored.turns)
        return
    with pytest.raises((errors.SnapshotRefused, errors.InvalidField), match=why):
        taken.result(10)
    assert len(engine.sessions) == 1


def _sealed(engine: Engine, image: Any, tensors: dict[str, torch.Tensor]) -> bytes:
    """As `encode`, with other tensors of the cache."""
    whole = b"".join(encode(image, engine.porter._origin))
    (length,) = struct.unpack_from("<I", whole, 20)
    data = save(tensors)
    manifest = json.loads(whole[24 : 24 + length])
    manifest |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    text = json.dumps(manifest).encode()
    head = whole[:20] + struct.pack("<I", len(text)) + text
    return head + hashlib.sha256(head).digest() + data


def test_a_file_that_is_no_session_is_told(make_engine: MakeEngine) -> None:
    """Such as a worker's own snapshots, which have the cache alone."""
    engine = talked(make_engine())
    _, image = engine.keeper.copy("default", "a").result(10)
    snapshot = b"".join(encode(image, engine.porter._origin))
    with pytest.raises(errors.SnapshotRefused, match="a cache alone, and no session"):
        engine.porter.take_in("default", "b", snapshot).result(10)


def test_what_is_packed_is_only_what_there_is(make_engine: MakeEngine) -> None:
    engine = talked(make_engine())
    stored, image = engine.keeper.copy("default", "a").result(10)
    size = sum(map(len, pack(stored, image, engine.porter._origin)))
    assert size < image.layout.bytes + 8192


def test_a_cache_that_lags_goes_as_far_as_it_is(make_engine: MakeEngine, tmp_path: Path) -> None:
    """And is not taken for what it is not by the snapshots either."""
    calm, engine = make_engine(), make_engine(state_dir=tmp_path / "state", checkpoints=5)
    for each in (calm, engine):
        create(each, "a", POLICY)
        for number in range(3):
            ask(each, PROMPT[: 90 + number], "a")
            if each is engine and number == 0:
                saved(engine)
                engine._archive._delay = 60  # type: ignore[union-attr]
    for each in (calm, engine):
        each.keeper.rewind("default", "a", 2).result(10)
    data = taken_out(engine)
    assert session(engine, "a").cached_turns == 1
    engine._archive._delay = 0  # type: ignore[union-attr]
    engine.keeper.update("default", "a", SessionChange(labels={"a": "b"})).result(10)
    saved(engine)
    assert engine._archive.shelf.turns(session(engine, "a")) == [1]  # type: ignore[union-attr]
    other = make_engine()
    other.porter.take_in("default", "a", data).result(10)
    through = ask(calm, "go on", "a", max_tokens=40)
    for each, reason in ((engine, RebuildReason.REWOUND), (other, RebuildReason.RESTARTED)):
        again = ask(each, "go on", "a", max_tokens=40)
        assert again.token_ids == through.token_ids
        assert again.usage.rebuild_reason is reason
        assert 80 < again.usage.cached_tokens < 150


def saved(engine: Engine) -> None:
    """Wait until the session has a snapshot of its cache."""
    assert engine._archive is not None
    for _ in range(500):
        if engine._archive.shelf.current(session(engine, "a")):
            return
        threading.Event().wait(0.01)
    raise AssertionError("no snapshot was made")


def test_of_many_bad_turns_the_first_is_told(make_engine: MakeEngine) -> None:
    engine = talked(make_engine())
    _, tensors = decode(taken_out(engine), engine.porter._origin)
    _record(tensors, turns=[{}] * 50_000)
    image = dataclasses.replace(engine.keeper.copy("default", "a").result(10)[1], state=None)
    sealed = b"".join(encode(image, engine.porter._origin, tensors))
    with pytest.raises(errors.SnapshotRefused, match="malformed: 11 faults"):
        engine.porter.take_in("default", "b", sealed).result(10)


@pytest.mark.parametrize(
    "counts",
    [
        {"sampled": 900},
        {"n": 31},
        {"measured": False, "packed": 1},
        {"measured": True},
        {"measured": True, "packed": 1},
    ],
)
def test_a_cache_that_the_policy_never_makes_is_refused(
    make_engine: MakeEngine, counts: dict[str, int]
) -> None:
    engine = talked(make_engine())
    stored, image = engine.keeper.copy("default", "a").result(10)
    assert image.state is not None
    state = dataclasses.replace(image.state, **counts)
    state = dataclasses.replace(state, evicted=state.seen - state.n)
    parts = pack(stored, dataclasses.replace(image, state=state), engine.porter._origin)
    with pytest.raises(errors.SnapshotRefused, match="no state of"):
        engine.porter.take_in("default", "b", b"".join(parts)).result(10)


def test_an_engine_that_has_ended_keeps_nobody_waiting(make_engine: MakeEngine, tmp_path: Path) -> None:
    engine = talked(make_engine())
    engine.stop(grace=0)
    assert engine.keeper.copy("default", "a").result(5)[0].id == "a"
    with pytest.raises(errors.Draining):
        engine.porter.take_out("default", "a")
