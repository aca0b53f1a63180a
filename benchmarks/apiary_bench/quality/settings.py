"""What a run was asked to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import buzz
from apiary_bench.errors import SettingsError
from apiary_bench.quality.bench import Budget
from apiary_bench.quality.tasks import TASKS


def precision(weights: str, cache_dtype: str) -> str:
    """Of weights, and of caches where that is not float32."""
    return weights if cache_dtype == "float32" else f"{weights}, {cache_dtype} cache"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """A run.

    Attributes:
        data: the directory of the evaluation files.
        tasks: names; all by default.
        policies: specifications; all registered ones by default.
        limit: documents of each task; None: the task's own number.
        model: a name or path.
        weights: how the model's are kept.
        cache_dtype: of the caches' entries.
        entries: targets of the tasks with an absolute one; `ratios`: of those relative to the prompt. Where
            both are given several values they go in pairs.
        match: scale policies to equal average bytes or entries; None: run them as written.
        baseline: the policy that all are compared with.
        seed: of the bootstrap and the conversations.
        threads: of torch.

    Raises:
        SettingsError: a value is unknown or out of range.
    """

    data: Path
    tasks: tuple[str, ...] = ()
    policies: tuple[str, ...] = ()
    limit: int | None = None
    model: str = "smollm2-135m"
    weights: Literal["fp32", "int8"] = "fp32"
    cache_dtype: Literal["float32", "bfloat16", "float16", "int8"] = "float32"
    entries: tuple[int, ...] = (564,)
    ratios: tuple[float, ...] = (2.5,)
    match: Literal["bytes", "entries"] | None = "bytes"
    baseline: str = "full"
    seed: int = 0
    threads: int = 2

    @property
    def precision(self) -> str:
        """Of weights, and of caches where that is not float32."""
        return precision(self.weights, self.cache_dtype)

    def __post_init__(self) -> None:
        if not self.tasks:
            object.__setattr__(self, "tasks", tuple(TASKS))
        if not self.policies:
            object.__setattr__(self, "policies", buzz.names())
        for task in self.tasks:
            if task not in TASKS:
                raise SettingsError(f"unknown task {task!r}; known are {', '.join(TASKS)}")
        if len(set(self.tasks)) < len(self.tasks):
            raise SettingsError("a task is given twice")
        if self.baseline not in {"full", *self.policies}:
            raise SettingsError(f"the baseline {self.baseline!r} is none of the policies")
        if not self.entries or any(not 1 <= entries <= buzz.policy.MAX_BOUND for entries in self.entries):
            raise SettingsError(f"entries must be between 1 and {buzz.policy.MAX_BOUND}")
        if not self.ratios or any(not 1 <= ratio <= 1000 for ratio in self.ratios):
            raise SettingsError("ratios must be between 1 and 1000")
        if 1 < len(self.entries) != len(self.ratios) > 1:
            raise SettingsError("several entries and several ratios go in pairs: give equally many of both")
        if self.limit is not None and self.limit < 1:
            raise SettingsError("limit must be at least 1")
        if self.threads < 1:
            raise SettingsError("threads must be at least 1")

    def budgets(self, uses: Sequence[str]) -> list[Budget]:
        """The budgets that differ in what a task uses of them."""
        count = max(len(self.entries), len(self.ratios))
        entries = self.entries * (count if len(self.entries) == 1 else 1)
        ratios = self.ratios * (count if len(self.ratios) == 1 else 1)
        found: dict[tuple[float, ...], Budget] = {}
        for budget in map(Budget, entries, ratios):
            found.setdefault(tuple(getattr(budget, use) for use in sorted(uses)), budget)
        return list(found.values())
