"""The tasks in small, and policies for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apiary_bench.quality.bench import Bench, Budget
from apiary_bench.quality.run import Stage
from apiary_bench.quality.tasks.fidelity import Fidelity
from apiary_bench.quality.tasks.qa10 import QA10
from apiary_bench.quality.tasks.recall import Recall
from apiary_bench.quality.tasks.summary import CNN_DM, XSUM
from apiary_bench.quality.tasks.task import Task
from apiary_bench.quality.tasks.wikitext import WikiText

SPECS = (
    "h2o(heavy=40,recent=40,block=4)",
    "streaming(sink=4,window=80,block=4)",
    "buzz(sink=2,window=20,threshold=60)",
)
SMALL: dict[str, Task[Any]] = {
    "wikitext": WikiText(length=300, warmup=120, chunk=16),
    "xsum": XSUM,
    "cnn_dm": CNN_DM,
    "qa10": QA10(output=8),
    "fidelity": Fidelity(output=8, sources=(QA10(), XSUM)),
    "recall": Recall(output=3, first_words=20, later_words=3),
}
BUDGET = Budget(90, 2.5)


def stage(name: str, bench: Bench, data: Path, limit: int = 2) -> Stage:
    task = SMALL[name]
    return Stage(task, BUDGET, task.documents(data, bench, limit, 0), f"{name}-key")


def silent(stage: str, done: int, total: int) -> None: ...
