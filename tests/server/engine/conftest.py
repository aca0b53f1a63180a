"""Fixtures of the engine's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from apiary_server.engine.engine import Engine


@pytest.fixture
def make(make_engine: Callable[..., Engine], tmp_path: Path) -> Callable[..., Engine]:
    """Make an engine on the same directory, after the one before was closed."""
    return lambda **fields: make_engine(start=False, **({"state_dir": tmp_path / "state"} | fields))
