"""How far a benchmark is."""

from __future__ import annotations

from typing import Protocol


class Observer(Protocol):
    """Hears how far a run is."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` documents or turns of a stage are finished; it is called with 0 first."""
