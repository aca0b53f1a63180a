"""A run: every policy on every document of every task, resumed where an earlier run stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import buzz
from apiary_bench.errors import DataError
from apiary_bench.progress import Observer
from apiary_bench.quality.bench import Bench, Budget, contenders
from apiary_bench.quality.journal import Journal
from apiary_bench.quality.settings import Settings
from apiary_bench.quality.tasks import TASKS
from apiary_bench.quality.tasks.task import Outcome, Task
from apiary_server.model import loader
from apiary_server.model.catalog import resolve

# what a model's directory may hold that makes its outputs
_MODEL_FILES = (".safetensors", ".json", ".jinja", ".txt", ".model")
# of ours, what asks, keeps and shows, and leaves outcomes as they are
_AROUND = (
    "journal.py",
    "plots.py",
    "record.py",
    "report.py",
    "sample.py",
    "settings.py",
    "statistics.py",
    "tables.py",
)


@dataclass(frozen=True, slots=True)
class Stage:
    """A task under a budget, and what it needs to run."""

    task: Task[Any]
    budget: Budget
    documents: Sequence[Any]
    key: str

    @property
    def name(self) -> str:
        """For people."""
        return title(self.task.name, self.limits)

    @property
    def limits(self) -> dict[str, float]:
        """The budget, as far as the task uses it."""
        return {use: getattr(self.budget, use) for use in sorted(self.task.budget)}


def title(task: str, limits: Mapping[str, float]) -> str:
    """A task and its budget, for people."""
    words = {"entries": "{} entries", "ratio": "{:g}x less"}
    return f"{task} ({', '.join(words[use].format(limit) for use, limit in limits.items())})"


@dataclass(frozen=True, slots=True)
class Results:
    """The outcomes of a stage: `outcomes[document][policy]`, policies in the bench's order."""

    stage: Stage
    outcomes: list[list[Outcome]]


def prepare(settings: Settings) -> tuple[Bench, list[Stage]]:
    """Load the model and the documents.

    Raises:
        ModelUnavailable, UnservableModel: there is no such model, or its caches cannot be replaced.
        SettingsError: a policy is malformed or does not fit.
        DataError: the data is missing or malformed, or a document is longer than the model.
    """
    torch.set_num_threads(settings.threads)
    path = resolve(settings.model)
    loaded = loader.load(
        path,
        torch.device("cpu"),
        torch.float32,
        getattr(torch, settings.cache_dtype),
        weights=settings.weights,
    )
    bench = Bench(loaded, contenders(settings.policies, loaded.rotary.max_positions), settings.match)
    model = _digest(sorted(file for file in path.iterdir() if file.suffix in _MODEL_FILES), "model")
    stages = []
    for name in settings.tasks:
        task = TASKS[name]
        documents = task.documents(settings.data, bench, settings.limit or task.limit, settings.seed)
        if not documents:
            raise DataError(f"{name} has no documents in {settings.data}")
        for budget in settings.budgets(sorted(task.budget)):
            key = _key(settings, task, budget, bench, model)
            stages.append(Stage(task, budget, documents, key))
    return bench, stages


def run(bench: Bench, stages: Sequence[Stage], journal: Journal, observe: Observer) -> list[Results]:
    """Run what the journal does not have yet.

    Raises:
        SettingsError: a policy cannot be scaled to a document at all.
        BenchError: the journal cannot be written.
    """
    results = []
    for stage in stages:
        observe(stage.name, 0, len(stage.documents))
        for first in range(0, len(stage.documents), stage.task.together):
            group = range(len(stage.documents))[first : first + stage.task.together]
            missing = [number for number in group if journal.get(stage.key, number) is None]
            documents = [stage.documents[number] for number in missing]
            targets = [stage.task.target(document, stage.budget) for document in documents]
            if missing:
                with torch.inference_mode():
                    found = stage.task.run(documents, targets, bench)
                for number, outcomes in zip(missing, found, strict=True):
                    journal.put(stage.key, number, outcomes)
            observe(stage.name, group.stop, len(stage.documents))
        results.append(Results(stage, [journal[stage.key, number] for number in range(len(stage.documents))]))
    return results


def code() -> list[Path]:
    """The files of our code that an outcome may depend on: the policies' library whole, the worker's way
    from text to logits, and this benchmark without what only asks, keeps and shows."""
    library, worker = Path(buzz.__file__).parent, Path(loader.__file__).parent
    ours = [path for path in Path(__file__).parent.rglob("*.py") if path.name not in _AROUND]
    kernels = worker.rglob("*.[ch]")
    return sorted([*library.rglob("*.py"), *worker.rglob("*.py"), *kernels, *ours])


def _key(settings: Settings, task: Task[Any], budget: Budget, bench: Bench, model: str) -> str:
    """Names all that an outcome depends on, code included; not how many documents are run."""
    asked = {
        "task": repr(task),
        "budget": {use: getattr(budget, use) for use in sorted(task.budget)},
        "policies": [(each.label, str(each.policy)) for each in bench.contenders],
        "match": settings.match,
        "seed": settings.seed,
        "model": model,
        "weights": settings.precision,
        "torch": torch.__version__,
    }
    data = [settings.data / name for name in task.files]
    return f"{task.name}-{_digest([*data, *code()], asked)[:16]}"


def _digest(files: Iterable[Path], more: object) -> str:
    """Of the files' names and content, and of something that JSON can say."""
    digest = hashlib.sha256(json.dumps(more, sort_keys=True).encode())
    for file in files:
        with file.open("rb") as content:
            digest.update(file.name.encode() + hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()
