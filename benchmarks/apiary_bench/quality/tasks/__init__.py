"""The tasks, one a file."""

from __future__ import annotations

from typing import Any

from apiary_bench.quality.tasks.fidelity import Fidelity
from apiary_bench.quality.tasks.qa10 import QA10
from apiary_bench.quality.tasks.recall import Recall
from apiary_bench.quality.tasks.summary import CNN_DM, XSUM
from apiary_bench.quality.tasks.task import Task
from apiary_bench.quality.tasks.wikitext import WikiText

TASKS: dict[str, Task[Any]] = {
    task.name: task for task in (WikiText(), XSUM, CNN_DM, QA10(), Fidelity(), Recall())
}
