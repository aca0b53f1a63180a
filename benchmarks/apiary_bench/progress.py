"""How far a benchmark is."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Protocol


class Observer(Protocol):
    """Hears how far a run is."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` documents or turns of a stage are finished; it is called with 0 first."""


def begin(observe: Observer, stage: str, total: int) -> Callable[[], None]:
    """Begin a stage; the returned function is to be called as each of its `total` parts is finished."""
    done = count(1)
    observe(stage, 0, total)
    return lambda: observe(stage, next(done), total)
