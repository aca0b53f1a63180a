"""Caches that come back from snapshots: answers go on as if nothing had been; what was computed anew is
said."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from apiary_server import errors
from apiary_server.engine.engine import Engine
from apiary_server.sessions.info import RebuildReason, State
from apiary_server.sessions.request import SessionChange
from apiary_server.sessions.snapshot import decode
from tests import tiny
from tests.server.driver import (
    Reader,
    ask,
    begin,
    create,
    outcome,
    request,
    same,
    session,
    state,
    step,
    until,
)
from tests.server.engine.lasting import (
    SLOT,
    WORKSPACE,
    archive,
    close,
    hang_reads,
    refuse_writes,
    saved,
    snapshots,
)

MakeEngine = Callable[..., Engine]
Make = Callable[..., Engine]
PROMPT = list(range(3, 153))
POLICY = "buzz(sink=2,window=8,threshold=20)"


@pytest.mark.parametrize(
    "policy",
    [
        POLICY,
        "full(bound=900)",
        "buzz2(sink=2,window=8,hot=10,cells=8)",
        "corm(budget=40,recent=8,queries=8)",
    ],
)
@pytest.mark.parametrize("cache_dtype", ["float32", "int8"])
def test_another_engine_goes_on_without_computing_anew(
    make: Make, make_engine: MakeEngine, policy: str, cache_dtype: str
) -> None:
    calm, engine = make_engine(start=False, cache_dtype=cache_dtype), make(cache_dtype=cache_dtype)
    for each in (calm, engine):
        create(each, "a", policy)
        for number in range(3):
            ask(each, PROMPT[: 20 + 40 * number], "a", max_tokens=5 + 13 * number)
    close(engine)
    other = make(cache_dtype=cache_dtype)
    assert other.sessions.get("default", "a").state is State.STORED
    again, through = (ask(each, "go on", "a", max_tokens=40) for each in (other, calm))
    assert again.token_ids == through.token_ids
    assert again.usage.rebuild_reason is None
    assert (again.usage.cached_tokens, again.usage.evicted_entries) == (
        through.usage.cached_tokens,
        through.usage.evicted_entries,
    )
    assert same(
        state(session(other, "a")) | {"update_time": 0}, state(session(calm, "a")) | {"update_time": 0}
    )
    close(other)


def test_a_snapshot_that_lags_is_made_up_for(make: Make, make_engine: MakeEngine) -> None:
    calm, engine = make_engine(start=False), make()
    for each in (calm, engine):
        create(each, "a", POLICY)
        ask(each, PROMPT, "a", max_tokens=5)
    saved(engine, "a")
    archive(engine)._delay = 60
    for each in (calm, engine):
        for number in range(3):
            ask(each, PROMPT[:30], "a", max_tokens=7 + number)
    close(engine, snapshots=False)
    other = make()
    again, through = (ask(each, "go on", "a", max_tokens=40) for each in (other, calm))
    assert again.token_ids == through.token_ids
    assert again.usage.rebuild_reason is RebuildReason.RESTARTED
    assert 100 < again.usage.cached_tokens < through.usage.cached_tokens
    assert ask(other, "and on", "a").usage.rebuild_reason is None
    close(other)


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "how", [damage, Path.unlink, lambda path: path.write_bytes(b""), lambda path: path.chmod(0)]
)
def test_a_snapshot_that_is_broken_is_told(
    make: Make, make_engine: MakeEngine, tmp_path: Path, how: Callable[[Path], object]
) -> None:
    calm, engine = make_engine(start=False), make()
    for each in (calm, engine):
        create(each, "a", POLICY)
        ask(each, PROMPT, "a")
    close(engine)
    other = make()
    (path,) = snapshots(tmp_path)
    how(path)
    again, through = (ask(each, "go on", "a", max_tokens=40) for each in (other, calm))
    assert again.token_ids == through.token_ids
    if how is not Path.chmod and path.exists():
        assert again.usage.rebuild_reason in (RebuildReason.SNAPSHOT_CORRUPT, None)
    saved(other, "a")
    close(other)


def test_damage_is_told_by_its_reason(make: Make, tmp_path: Path) -> None:
    engine = make()
    create(engine, "a", POLICY)
    ask(engine, PROMPT, "a")
    close(engine)
    for how in (damage, Path.unlink):
        other = make()
        (path,) = snapshots(tmp_path)
        how(path)
        usage = ask(other, "go on", "a").usage
        assert (usage.rebuild_reason, usage.cached_tokens) == (RebuildReason.SNAPSHOT_CORRUPT, 0)
        close(other)


def test_a_worker_with_the_wrong_key_leaves_the_others_snapshots(make: Make, tmp_path: Path) -> None:
    keys = [tmp_path / name for name in ("right", "wrong")]
    for key in keys:
        key.write_text(f"{key.name} and long enough")
    engine = make(snapshot_key_file=keys[0])
    create(engine, "a", POLICY)
    ask(engine, PROMPT, "a")
    close(engine)
    other = make(snapshot_key_file=keys[1])
    assert archive(other).read(session(other, "a")) == (None, RebuildReason.SNAPSHOT_CORRUPT)
    assert archive(other).shelf.turns(session(other, "a")) == []
    close(other)
    again = make(snapshot_key_file=keys[0])
    assert ask(again, "go on", "a").usage.rebuild_reason is None
    saved(again, "a")
    assert len(snapshots(tmp_path)) == 1
    close(again)


def test_an_earlier_snapshot_is_better_than_none(make: Make, tmp_path: Path) -> None:
    engine = make(checkpoints=1)
    create(engine, "a", POLICY)
    for _ in range(2):
        ask(engine, PROMPT, "a")
        saved(engine, "a")
    close(engine)
    _, second = snapshots(tmp_path)
    damage(second)
    other = make(checkpoints=1)
    usage = ask(other, "go on", "a").usage
    assert usage.rebuild_reason is RebuildReason.SNAPSHOT_CORRUPT
    assert usage.cached_tokens > 100
    close(other)


@pytest.mark.parametrize(("written", "read"), [(4, None), (4, 2), (None, 4)])
def test_snapshots_of_any_bits_are_read(
    make: Make, tmp_path: Path, written: int | None, read: int | None
) -> None:
    model = str(tiny.save(tmp_path, tiny.config(head_dim=32)))
    narrow = {"model": model, "policy": "full(bound=500)", "cache_budget": 2**25, "workspace_entries": 700}
    engine = make(snapshot_bits=written, **narrow)
    create(engine, "a")
    ask(engine, 2 * PROMPT, "a")
    before = state(session(engine, "a"))
    close(engine)
    other = make(snapshot_bits=read, **narrow)
    usage = ask(other, "go on", "a").usage
    assert (usage.rebuild_reason, usage.cached_tokens) == (None, 315)
    after = state(session(other, "a"))
    for name in ("keys", "values"):
        held, again = before[name], after[name]
        assert isinstance(held, torch.Tensor)
        assert isinstance(again, torch.Tensor)
        assert torch.equal(held[:, :, 187:315], again[:, :, 187:315])
        assert torch.equal(held[:, :, :187], again[:, :, :187]) is (written is None)
        assert torch.allclose(held[:, :, :187], again[:, :, :187], atol=0.15 * held.abs().max().item())
    close(other)


def test_exports_are_exact(make: Make, tmp_path: Path) -> None:
    model = str(tiny.save(tmp_path, tiny.config(head_dim=32)))
    narrow = {"model": model, "policy": "full(bound=500)", "cache_budget": 2**25, "workspace_entries": 700}
    engine = make(snapshot_bits=2, **narrow)
    create(engine, "a")
    ask(engine, 2 * PROMPT, "a")
    taken = engine.porter.take_out("default", "a")
    step(engine)
    manifest, tensors = decode(b"".join(taken.result(10)), engine.porter._origin)
    assert manifest.bits is None
    keys = state(session(engine, "a"))["keys"]
    assert isinstance(keys, torch.Tensor)
    assert torch.equal(tensors["keys"], keys)
    close(engine)


def test_heads_that_cannot_be_grouped_are_told(make: Make) -> None:
    with pytest.raises(ValueError, match="--snapshot-bits quantises 32 channels together"):
        make(snapshot_bits=4)


def test_another_model_s_snapshots_are_not_used(make: Make) -> None:
    engine = make()
    create(engine, "a", POLICY)
    ask(engine, PROMPT, "a")
    close(engine)
    other = make(dtype="bfloat16", cache_dtype="bfloat16")
    usage = ask(other, "go on", "a").usage
    assert (usage.rebuild_reason, usage.cached_tokens) == (RebuildReason.MODEL_CHANGED, 0)
    close(other)


def test_a_key_makes_others_snapshots_worthless(make: Make, tmp_path: Path) -> None:
    engine = make()
    create(engine, "a", POLICY)
    ask(engine, PROMPT, "a")
    close(engine)
    (tmp_path / "key").write_text("0123456789abcdef\n")
    for reason in (RebuildReason.SNAPSHOT_CORRUPT, None):
        other = make(snapshot_key_file=tmp_path / "key")
        assert ask(other, "go on", "a").usage.rebuild_reason is reason
        close(other)
    (tmp_path / "key").write_text("short")
    with pytest.raises(ValueError, match="has 5 bytes, and 16 are the least"):
        make(snapshot_key_file=tmp_path / "key")


def test_what_was_taken_back_is_in_no_snapshot(make: Make, make_engine: MakeEngine, tmp_path: Path) -> None:
    engine = make()
    create(engine, "a", POLICY)
    for _ in range(3):
        ask(engine, PROMPT, "a")
    saved(engine, "a")
    before = snapshots(tmp_path)
    engine.keeper.rewind("default", "a", 1)
    step(engine)
    ask(engine, "another way", "a")
    ask(engine, "another way", "a")
    saved(engine, "a")
    assert [path.name for path in snapshots(tmp_path)] == [path.name for path in before]
    calm = make_engine(start=False)
    create(calm, "a", POLICY)
    for prompt in (PROMPT, "another way", "another way"):
        ask(calm, prompt, "a")
    close(engine)
    other = make()
    again, through = (ask(each, "go on", "a", max_tokens=40) for each in (other, calm))
    assert (again.token_ids, again.usage.rebuild_reason) == (through.token_ids, None)
    close(other)


def test_a_killed_worker_s_rewind_leaves_no_snapshot_that_is_used(make: Make, tmp_path: Path) -> None:
    """The file of turns that were taken back may be there still, by the name that a new one will have."""
    engine = make()
    create(engine, "a", POLICY)
    for _ in range(2):
        ask(engine, PROMPT, "a")
    saved(engine, "a")
    (path,) = snapshots(tmp_path)
    stale = path.read_bytes()
    archive(engine)._delay = 60
    engine.keeper.rewind("default", "a", 1)
    step(engine)
    ask(engine, "another way", "a")
    close(engine, snapshots=False)
    path.write_bytes(stale)
    other = make()
    usage = ask(other, "go on", "a").usage
    assert (usage.rebuild_reason, usage.cached_tokens) == (RebuildReason.RESTARTED, 0)
    close(other)


def test_checkpoints_make_rewinds_quick(make: Make, make_engine: MakeEngine) -> None:
    calm, engine = make_engine(start=False), make(checkpoints=3)
    for each in (calm, engine):
        create(each, "a", POLICY)
        for number in range(4):
            ask(each, PROMPT[: 50 + number], "a")
            if each is engine:
                saved(engine, "a")
    for each in (calm, engine):
        each.keeper.rewind("default", "a", 2)
        step(each)
    again, through = (ask(each, "go on", "a", max_tokens=40) for each in (engine, calm))
    assert again.token_ids == through.token_ids
    assert through.usage.rebuild_reason is RebuildReason.REWOUND
    assert through.usage.cached_tokens == 0
    assert again.usage.rebuild_reason is None
    assert again.usage.cached_tokens > 100
    close(engine)


def test_a_changed_policy_makes_them_worthless(make: Make) -> None:
    engine = make()
    create(engine, "a", POLICY)
    ask(engine, PROMPT, "a")
    saved(engine, "a")
    engine.keeper.update("default", "a", SessionChange(policy="streaming(sink=2,window=20)"))
    step(engine)
    close(engine)
    other = make()
    usage = ask(other, "go on", "a").usage
    assert (usage.rebuild_reason, usage.cached_tokens) == (RebuildReason.RESTARTED, 0)
    saved(other, "a")
    close(other)


def test_deleted_sessions_leave_no_file(make: Make, tmp_path: Path) -> None:
    engine = make()
    for id in ("a", "b"):
        create(engine, id, POLICY)
        ask(engine, PROMPT, id)
    saved(engine, "a", "b")
    engine.keeper.delete("default", "a")
    step(engine)
    close(engine)
    assert len(snapshots(tmp_path)) == 1
    (tmp_path / "state" / "snapshots" / f"{'0' * 32}-1.snapshot").write_bytes(b"an orphan")
    (tmp_path / "state" / "snapshots" / "x.unfinished").write_bytes(b"half")
    other = make()
    close(other)
    assert len(snapshots(tmp_path)) == 1


def test_a_stored_session_can_be_forked(make: Make, make_engine: MakeEngine) -> None:
    calm, engine = make_engine(start=False), make()
    for each in (calm, engine):
        create(each, "a", POLICY)
        ask(each, PROMPT, "a")
    close(engine)
    other = make()
    forked = other.keeper.fork("default", "a", "b")
    until(other, forked.done)
    assert forked.result(0).state is State.RESIDENT
    again, through = ask(other, "go on", "b", max_tokens=40), ask(calm, "go on", "a", max_tokens=40)
    assert (again.token_ids, again.usage.rebuild_reason) == (through.token_ids, None)
    close(other)


def test_snapshots_rest_while_a_session_is_forked(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, begun = make(), threading.Event()
    for id in ("a", "b"):
        create(engine, id)
        ask(engine, PROMPT, id)
    saved(engine, "a", "b")
    archive(engine)._delay = 60
    ask(engine, "go on", "b")
    monkeypatch.setattr(archive(engine), "_save", lambda _: begun.set())
    archive(engine)._rest_until = math.inf
    forked = engine.keeper.fork("default", "a", "c")
    archive(engine)._delay = 0
    assert not begun.wait(0.3)
    step(engine)
    forked.result(10)
    assert begun.wait(10)
    close(engine, snapshots=False)


def test_the_budget_of_snapshots_holds(make: Make, tmp_path: Path) -> None:
    engine = make(stored_budget=3 * SLOT)
    ids = [f"s{number}" for number in range(8)]
    for id in ids:
        create(engine, id)
        ask(engine, PROMPT, id)
        saved(engine, id)
        assert sum(path.stat().st_size for path in snapshots(tmp_path)) <= 3 * SLOT
    close(engine)
    other = make(stored_budget=3 * SLOT)
    reasons = [ask(other, "go on", id).usage.rebuild_reason for id in reversed(ids)]
    assert reasons[:2] == [None, None]
    assert set(reasons[4:]) == {RebuildReason.RESTARTED}
    close(other)


def test_idle_durability_waits(make: Make, tmp_path: Path) -> None:
    engine = make(durability="idle", snapshot_delay=60)
    create(engine, "a", POLICY)
    assert ask(engine, PROMPT, "a").usage.durable
    for _ in range(20):
        engine._mailbox.post(lambda: None)
        step(engine)
    assert not snapshots(tmp_path)
    close(engine)
    assert len(snapshots(tmp_path)) == 1


def test_a_store_that_is_full_stops_nobody(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make()
    create(engine, "a", POLICY)

    with monkeypatch.context() as patch:
        refuse_writes(engine, patch)
        for _ in range(100):
            ask(engine, "more", "a", max_tokens=2)
            if archive(engine).degraded:
                break
        assert engine.capacity().store_degraded
        ask(engine, "and more", "a")
    saved(engine, "a")
    for _ in range(100):
        if not engine.capacity().store_degraded:
            break
        threading.Event().wait(0.02)
    assert not engine.capacity().store_degraded
    close(engine)


def test_the_last_used_are_brought_back_before_anybody_asks(
    make_engine: MakeEngine, make: Make, tmp_path: Path
) -> None:
    engine = make()
    for number in range(3):
        create(engine, f"s{number}", POLICY)
        ask(engine, PROMPT, f"s{number}")
    close(engine)
    other = make_engine(state_dir=tmp_path / "state")
    for _ in range(200):
        if other.capacity().resident_sessions == 3:
            break
        threading.Event().wait(0.02)
    assert other.capacity().resident_sessions == 3


def test_what_a_checkpoint_lacks_is_computed_and_told(make: Make) -> None:
    engine = make(checkpoints=9)
    create(engine, "a", POLICY)
    ask(engine, PROMPT, "a")
    saved(engine, "a")
    archive(engine)._delay = 60
    ask(engine, PROMPT, "a")
    archive(engine)._delay = 0
    ask(engine, PROMPT, "a")
    saved(engine, "a")
    engine.keeper.rewind("default", "a", 2)
    step(engine)
    usage = ask(engine, "go on", "a").usage
    assert usage.rebuild_reason is RebuildReason.REWOUND
    assert 100 < usage.cached_tokens < 200
    close(engine)


def test_a_store_that_hangs_is_told(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apiary_server.sessions.archive._PATIENCE", 0.1)
    engine, go_on = make(), threading.Event()
    create(engine, "a", POLICY)
    write = archive(engine).shelf._store.write

    def hang(*arguments: Any) -> None:
        go_on.wait(20)
        write(*arguments)

    monkeypatch.setattr(archive(engine).shelf._store, "write", hang)
    for _ in range(100):
        ask(engine, "more", "a", max_tokens=2)
        if engine.capacity().store_degraded:
            break
    assert engine.capacity().store_degraded
    assert not archive(engine).hurry(session(engine, "a"))
    go_on.set()
    saved(engine, "a")
    assert not engine.capacity().store_degraded
    close(engine)


def test_a_store_that_hangs_when_it_is_read_holds_nobody_up(
    make: Make, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apiary_server.sessions.fetcher._PATIENCE", 0.3)
    calm, engine = make_engine(start=False), make()
    for id in ("a", "b", "c"):
        for each in (calm, engine):
            create(each, id, POLICY)
            ask(each, PROMPT, id)
    close(engine)
    other = make()
    go_on, hangs = hang_reads(other, monkeypatch)
    for id in ("a", "b"):
        hangs.clear()
        answer = ask(other, "go on", id)
        assert answer.token_ids == ask(calm, "go on", id).token_ids
        assert answer.usage.rebuild_reason is RebuildReason.SNAPSHOT_CORRUPT
    assert not hangs.is_set(), "the second asked nothing"
    go_on.set()
    while archive(other)._fetcher._hangs:
        threading.Event().wait(0.005)
    answer = ask(other, "go on", "c")
    assert answer.usage.rebuild_reason is None
    assert answer.token_ids == ask(calm, "go on", "c").token_ids
    assert ask(other, "and on", "a").token_ids == ask(calm, "and on", "a").token_ids, "nothing came in late"
    close(other)


def test_who_leaves_while_the_cache_is_brought_leaves_nothing(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    for id in ("a", "b"):
        create(engine, id)
        ask(engine, PROMPT, id)
    close(engine)
    other = make()
    go_on, hangs = hang_reads(other, monkeypatch)
    left = [begin(other, request("go on", session=id)) for id in ("a", "b")]
    step(other)
    assert hangs.wait(10)
    assert other.capacity().running_turns == 2, "each has its slot"
    for reader in left:
        reader.close()
    step(other)
    assert [type(reader.error) for reader in left] == [errors.Cancelled] * 2
    assert other._loop.residency.pool.leased_bytes == 0, "though one read goes on"
    go_on.set()
    for id in ("a", "b"):
        answer = ask(other, "go on", id)
        assert (answer.usage.rebuild_reason, other.sessions.get("default", id).turn_count) == (None, 2)
    close(other)


def test_nobody_who_asks_waits_for_them(make: Make) -> None:
    engine = make()
    for id in ("a", "b", "c"):
        create(engine, id)
        ask(engine, PROMPT, id)
    close(engine)
    other, busy = make(), True
    other._restorer.start(lambda: busy)
    states = lambda: {id: other.sessions.get("default", id).state for id in "abc"}  # noqa: E731
    usage = ask(other, "go on", "b").usage
    assert usage.rebuild_reason is None
    for _ in range(20):
        other._mailbox.post(lambda: None)
        step(other)
        threading.Event().wait(0.005)
    assert states() == {"a": State.STORED, "b": State.RESIDENT, "c": State.STORED}
    busy = False
    until(other, lambda: set(states().values()) == {State.RESIDENT})
    close(other)


def test_none_has_to_leave_for_them(make: Make) -> None:
    engine = make()
    ids = [f"s{number}" for number in range(5)]
    for id in ids:
        create(engine, id)
        ask(engine, PROMPT, id)
    close(engine)
    other = make(cache_budget=WORKSPACE + 4 * SLOT)  # one is the reserve
    other._restorer.start(lambda: False)
    for _ in range(60):
        other._mailbox.post(lambda: None)
        step(other)
        threading.Event().wait(0.005)
    states = [other.sessions.get("default", id).state for id in ids]
    assert states == [State.STORED, State.STORED, *3 * [State.RESIDENT]]
    assert not other._loop.residency.moves["stored"]
    close(other)


def test_a_stored_cache_is_brought_for_its_map(make: Make) -> None:
    engine = make()
    create(engine, "a", POLICY)
    ask(engine, PROMPT, "a", max_tokens=9)
    before = outcome(engine, engine.keeper.look("default", "a"))
    close(engine)
    other = make()
    looked = other.keeper.look("default", "a")
    until(other, looked.done)
    after = looked.result(0)
    assert (after.state, after.tokens) == (State.RESIDENT, before.tokens)
    assert (after.position == before.position).all()
    assert before.score is not None
    assert after.score is not None
    assert (after.score == before.score).all()
    assert not session(other, "a").busy
    close(other)


@pytest.mark.parametrize("where", ["read", "admit"])
def test_turns_on_their_way_are_told_that_the_worker_shuts_down(
    make: Make, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """While one cache is read, or one turn is checked, another waits for that."""
    engine = make()
    for id in ("a", "b"):
        create(engine, id)
        ask(engine, PROMPT, id)
    close(engine)
    other, begun, go_on = make(), threading.Event(), threading.Event()
    holder, name = (archive(other)._fetcher, "_read") if where == "read" else (other._door, "admit")
    work = getattr(holder, name)

    def hang(*arguments: Any) -> Any:
        begun.set()
        go_on.wait(20)
        return work(*arguments)

    monkeypatch.setattr(holder, name, hang)
    held = [other.sessions.begin_turn("default", id).result(0) for id in "ab"]
    readers = [Reader() for _ in held]
    queued = [
        other.open(request("go on", record.id, wait=True), reader)
        for record, reader in zip(held, readers, strict=True)
    ]
    other._thread.start()
    for record in held:
        other.sessions.end_turn(record)
    assert begun.wait(10)
    other.stop(grace=0)
    go_on.set()
    for each, reader in zip(queued, readers, strict=True):
        error = each.exception(10)
        until = time.monotonic() + 10
        while error is None and reader.error is None and time.monotonic() < until:
            time.sleep(0.005)
        assert isinstance(error or reader.error, errors.Draining)
    assert not any(session(other, id).busy for id in ("a", "b"))
