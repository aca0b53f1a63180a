"""Which engine is given what, when."""

from __future__ import annotations

from typing import Any

import pytest

from apiary_bench.peers import run as runs
from apiary_bench.peers.results import Results
from apiary_bench.peers.workload import Load, Workload

from .fakes import FakeEngine, FakePeer, run, workload

LOAD = Load(sessions=2, history=10, turns=2, input=4, output=5)
SETTINGS = runs.Settings(repeats=1, seed=0, vocab_size=300, limit=60)


def settings(**changes: Any) -> runs.Settings:
    return runs.Settings(**{"repeats": 1, "seed": 0, "vocab_size": 300, "limit": 60, **changes})


async def measured(
    *peers: FakePeer,
    workloads: list[Workload],
    settings: runs.Settings = SETTINGS,
    results: Results | None = None,
) -> Results:
    """All of it."""
    found = results or Results({"peers": [peer.name for peer in peers], "repeats": settings.repeats})
    await runs.run(peers, workloads, settings, found, lambda *_: None, lambda _: None)
    return found


def test_every_other_repeat_has_the_other_order() -> None:
    peers = [FakePeer("a"), FakePeer("b")]
    loads = [workload(LOAD, name="x"), workload(LOAD, name="y")]
    order = [(repeat, load.name, peer.name) for repeat, load, peer in runs.plan(peers, loads, 2)]
    assert order == [
        *[(0, "x", "a"), (0, "x", "b"), (0, "y", "a"), (0, "y", "b")],
        *[(1, "x", "b"), (1, "x", "a"), (1, "y", "b"), (1, "y", "a")],
    ]


async def test_one_engine_at_a_time_started_anew_for_each_workload() -> None:
    alone: list[str] = []
    peers = [FakePeer("a", alone=alone), FakePeer("b", alone=alone)]
    results = await measured(
        *peers, workloads=[workload(LOAD, name="x"), workload(LOAD, name="y")], settings=settings(repeats=2)
    )
    assert [peer.started for peer in peers] == [["x", "y", "x", "y"]] * 2
    assert len(results.runs) == 8
    assert not any(found.void for found in results.runs)


async def test_a_run_has_what_the_engine_is_and_what_it_did() -> None:
    peer = FakePeer()
    (found,) = (await measured(peer, workloads=[workload(LOAD)])).runs
    assert found.identity == peer.engine.identity
    (point,) = found.points
    assert (point.label, point.size, point.void) == ("no. 1", 1, None)
    assert point.measures is not None
    assert point.measures.memory_bytes == 3 * 2**20
    assert [(turn["session"], turn["turn"], turn["tokens"]) for turn in point.turns] == [
        (0, 0, 5),
        (0, 1, 5),
        (1, 0, 5),
        (1, 1, 5),
    ]
    assert peer.engine.forgotten == ["small-1-0-0", "small-1-0-1"]


async def test_points_and_repeats_have_tokens_of_their_own() -> None:
    peer = FakePeer()
    await measured(peer, workloads=[workload(LOAD, LOAD)], settings=settings(repeats=2))
    histories = [turn.tokens for turn in peer.engine.turns if turn.fresh == 10]
    assert len(histories) == len(set(histories)) == 2 * 2 * 2


async def test_an_engine_that_does_not_start_is_void_with_its_reason() -> None:
    (found,) = (await measured(FakePeer(error="no compiler"), workloads=[workload(LOAD, LOAD)])).runs
    assert found.identity is None
    assert [point.void for point in found.points] == ["no compiler", "no compiler"]
    assert found.void


async def test_after_a_void_point_the_engine_is_spared_the_larger_ones() -> None:
    peer = FakePeer(engine=FakeEngine(failing=(2,)))
    (found,) = (await measured(peer, workloads=[workload(LOAD, LOAD, LOAD)])).runs
    assert [point.void for point in found.points] == [
        "1 of 3 turns failed; session 0, turn 0: out of memory",
        "spared, since no. 1 was void",
        "spared, since no. 1 was void",
    ]
    assert len(found.points[0].turns) == 3


async def test_a_point_that_takes_too_long_is_void() -> None:
    peer = FakePeer(engine=FakeEngine(stuck=True))
    (found,) = (await measured(peer, workloads=[workload(LOAD)], settings=settings(limit=0.05))).runs
    assert found.points[0].void == "it was not finished after 0 s"
    assert peer.engine.running == 0


async def test_conversations_beyond_the_engines_positions_are_not_tried() -> None:
    long = Load(sessions=1, history=995, input=4, output=5)
    peer = FakePeer()
    (found,) = (await measured(peer, workloads=[workload(LOAD, long)])).runs
    assert [point.void for point in found.points] == [None, "the engine takes 1000 positions, not 1005"]
    assert max(len(turn.tokens) for turn in peer.engine.turns) < 100


async def test_runs_that_are_there_are_not_made_again() -> None:
    peer = FakePeer()
    there = Results({"peers": ["fake"], "repeats": 2}, [run("fake", 1.0)])
    results = await measured(peer, workloads=[workload(LOAD)], settings=settings(repeats=2), results=there)
    assert peer.started == ["small"]
    assert [(found.repeat, found.points[0].label) for found in results.runs] == [(0, "no. 1"), (1, "no. 1")]


async def test_results_are_kept_after_every_run_and_turns_are_heard_of() -> None:
    kept: list[int] = []
    heard: list[tuple[str, int, int]] = []
    results = Results({"peers": ["fake"], "repeats": 2})
    await runs.run(
        [FakePeer()],
        [workload(LOAD)],
        settings(repeats=2),
        results,
        lambda stage, done, total: heard.append((stage, done, total)),
        lambda results: kept.append(len(results.runs)),
    )
    assert kept == [1, 2]
    turns = 2 * (1 + 2)
    assert {(stage, total) for stage, _, total in heard} == {("small: fake", 2 * turns)}
    assert sorted({done for _, done, _ in heard}) == list(range(2 * turns + 1))


@pytest.mark.parametrize("count", [1, 400])
async def test_reasons_are_kept_short(count: int) -> None:
    (found,) = (await measured(FakePeer(error="word " * count), workloads=[workload(LOAD)])).runs
    reason = found.points[0].void
    assert reason is not None
    assert len(reason) <= 300
    assert reason.endswith("...") == (count > 1)
