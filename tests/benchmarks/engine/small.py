"""A bench over the tiny model, with a policy that compacts often."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apiary_bench.engine.workbench import Setup, Workbench

POLICY = "h2o(heavy=20,recent=20,block=8)"


def workbench(model: Path, **setup: Any) -> Workbench:
    return Workbench(Setup(**({"model": str(model), "policy": POLICY, "threads": 1} | setup)))


class Heard:
    """What an observer of a run heard."""

    def __init__(self) -> None:
        self.stages: dict[str, list[tuple[int, int]]] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.stages.setdefault(stage, []).append((done, total))

    def whole(self) -> bool:
        """Whether every stage went from 0 to its end, one by one."""
        return all(
            heard == [(done, heard[0][1]) for done in range(heard[0][1] + 1)]
            for heard in self.stages.values()
        )
