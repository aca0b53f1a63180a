"""The first steps of a process leave nothing behind."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from apiary_server.engine.engine import Engine
from apiary_server.engine.warmup import warm_up
from apiary_server.model.runner import Piece
from tests.server.driver import ask, create

MakeEngine = Callable[..., Engine]


def warm(engine: Engine, policy: str | None = None) -> list[int]:
    """Warm it up; returns how many tokens each forward pass had."""
    runner, counts = engine._loop.runner, []
    real = runner.run

    def run(pieces: Sequence[Piece], *args: Any) -> torch.Tensor:
        counts.append(sum(len(piece.tokens) for piece in pieces))
        return real(pieces, *args)

    runner.run = run  # type: ignore[method-assign]
    warm_up(runner, engine._loop.residency, engine.sessions.one_shot("", policy), engine._rotary)
    runner.run = real  # type: ignore[method-assign]
    return counts


@pytest.mark.parametrize(
    ("policy", "counts"),
    [
        ("buzz(sink=2,window=8,threshold=20)", [32, 1]),
        ("buzz2(sink=2,window=8,hot=10,cells=8)", [32, 1]),
        ("full(bound=900)", [32, 1]),
        ("full(bound=20)", [20]),
        ("window(window=4)", [20, 1]),
    ],
)
def test_nothing_is_left(make_engine: MakeEngine, policy: str, counts: list[int]) -> None:
    engine, calm = make_engine(start=False), make_engine(start=False)
    assert warm(engine, policy) == counts
    assert len(engine.sessions) == engine.capacity().resident_sessions == 0
    engine._loop.residency.check_integrity()
    assert engine._loop.residency.pool.leased_bytes == 0
    for each in (engine, calm):
        create(each, "a", policy)
    tokens = list(range(3, 18))
    again, through = (ask(each, tokens, "a", max_tokens=4) for each in (engine, calm))
    assert again.token_ids == through.token_ids


def test_a_started_engine_is_warm(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, threads = make_engine(start=False), []
    real = engine._loop.runner.run
    monkeypatch.setattr(
        engine._loop.runner,
        "run",
        lambda *args: threads.append(threading.current_thread().name) or real(*args),
    )
    engine.start()
    assert threads == ["engine", "engine"], "the thread that takes the steps, before anybody may ask"
    engine.stop(0)
    assert engine.healthy


def test_an_engine_that_cannot_compute_says_so(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, told = make_engine(start=False), threading.Event()

    def broken(*_: Any) -> torch.Tensor:
        raise ValueError("broken kernel")

    monkeypatch.setattr(engine._loop.runner, "run", broken)
    engine.on_unhealthy = told.set
    engine.start()
    assert told.wait(10)
    assert not engine.healthy
