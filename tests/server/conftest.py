"""Fixtures of the server's tests: the tiny model, and engines that a test steps by hand or lets run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from apiary_server.engine.engine import Engine
from apiary_server.settings import Settings
from apiary_server.worker import build
from tests import tiny


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the tiny model."""
    return tiny.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def make_engine(tiny_model: Path) -> Iterator[Callable[..., Engine]]:
    """Builds engines over the tiny model; `start=False` leaves stepping to the test."""
    started: list[Engine] = []
    by_hand: list[Engine] = []

    def make(*, start: bool = True, **settings: object) -> Engine:
        defaults: dict[str, object] = {
            "model": str(tiny_model),
            "policy": "buzz(sink=2,window=8,threshold=20,stride=5)",
            "cache_budget": 2 * 2**20,
            "workspace_entries": 256,
            "slack": 16,
            "threads": 1,  # tiny products gain nothing from more, and lose much on a busy machine
        }
        engine = build(Settings.load(**(defaults | settings)))
        (started if start else by_hand).append(engine)
        if start:
            engine.start()
        return engine

    yield make
    for engine in started:
        engine.stop(grace=0)
    for engine in by_hand:  # what waits for a step would wait for ever, and keep the process
        for part in (engine._restorer, engine.porter, engine._admission):
            part.close()
