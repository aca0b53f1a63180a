"""Virtual environments of other engines: made once each, by pip, in the cache directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import IO

from filelock import FileLock

from apiary_bench.peers.engine import EngineError
from apiary_bench.progress import Observer
from apiary_server.model.catalog import user_cache

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
_RECIPE = "recipe.json"
# Prints what a distribution needs, line by line, but for extras; run by the environment's own interpreter.
_NEEDS = """
import sys
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
for each in map(Requirement, requires(sys.argv[1]) or ()):
    if each.name not in sys.argv[2:] and (each.marker is None or each.marker.evaluate({"extra": ""})):
        each.marker = None
        print(each)
"""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is installed.

    Attributes:
        package: the engine's distribution.
        version: of it.
        torch: the version of torch that it takes, a CPU build; None: none.
        without: dependencies that the distribution names and that are left out.
        build: variables for a package that is built from its sources.
    """

    package: str
    version: str
    torch: str | None = None
    without: tuple[str, ...] = ()
    build: Mapping[str, str] = field(default_factory=dict)


class Environment:
    """A virtual environment below `root`.

    Args:
        name: of its directory, and in progress and errors.
        recipe: what is in it.
        root: of all environments.
        torch_index: the index to take torch from; None: pip's own.
    """

    def __init__(self, name: str, recipe: Recipe, root: Path, torch_index: str | None = None) -> None:
        self.path = root / name
        self.log = root / f"{name}.install.log"
        # -E: what PYTHONPATH names is of this process's environment; -P: what lies beside a program is ours
        self.python = (str(self.path / "bin" / "python"), "-E", "-P")
        self._name = name
        self._recipe = recipe
        self._torch_index = torch_index

    @property
    def ready(self) -> bool:
        """Whether it is whole, by this recipe."""
        try:
            return bool(json.loads((self.path / _RECIPE).read_text()) == self._written())
        except (OSError, ValueError):
            return False

    def make(self, observe: Observer) -> None:
        """Make it, unless it is ready. All that pip says is in `log`.

        Raises:
            EngineError: pip failed, or would have taken a CUDA build of torch.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.parent / f".{self._name}.lock"):
                if not self.ready:
                    self._make(observe)
        except OSError as error:
            raise EngineError(f"{self._name} cannot be installed in {self.path}: {error}") from error

    def _make(self, observe: Observer) -> None:
        recipe, stage = self._recipe, f"install {self._name}"
        requirement = f"{recipe.package}=={recipe.version}"
        pinned = [] if recipe.torch is None else [f"torch=={recipe.torch}"]
        steps: list[Callable[[], None]] = [self._create]
        if pinned:
            steps.append(partial(self._install_torch, pinned))
        if recipe.without:
            steps.append(partial(self._install, "--no-deps", requirement))
            steps.append(lambda: self._install(*self._needs(), *pinned))
        else:
            steps.append(partial(self._install, requirement, *pinned))
        self.log.write_bytes(b"")
        for done, step in enumerate(steps):
            observe(stage, done, len(steps))
            step()
        (self.path / _RECIPE).write_text(json.dumps(self._written()))
        observe(stage, len(steps), len(steps))

    def _install_torch(self, pinned: Sequence[str]) -> None:
        """First and alone, so that the index chosen for it serves nothing else."""
        chosen = [] if self._torch_index is None else ["--index-url", self._torch_index]
        report = ["--dry-run", "--quiet", "--report", "-"]
        planned = json.loads(self._ask([*self._pip, *report, *chosen, *pinned]))
        if cuda := [
            each["metadata"]["name"]
            for each in planned["install"]
            if each["metadata"]["name"].startswith(("nvidia-", "cuda-"))
        ]:
            raise EngineError(
                f"{self._name} was not installed: pip would take a CUDA build of torch ({len(cuda)} packages "
                f"such as {cuda[0]}); name an index with CPU builds: --torch-index {CPU_INDEX}"
            )
        self._install(*chosen, *pinned)

    def _create(self) -> None:
        self._run([sys.executable, "-m", "venv", "--clear", str(self.path)])

    def _install(self, *arguments: str) -> None:
        self._run([*self._pip, *arguments])

    def _needs(self) -> list[str]:
        left_out = ["torch", *self._recipe.without]
        return self._ask([*self.python, "-c", _NEEDS, self._recipe.package, *left_out]).splitlines()

    @property
    def _pip(self) -> list[str]:
        options = ["--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
        return [*self.python, "-m", "pip", "install", *options]

    def _run(self, command: Sequence[str]) -> None:
        """Run a command; what it says goes to the log.

        Raises:
            EngineError: it failed.
        """
        with self.log.open("ab") as log:
            done = self._start(command, stdout=log, stderr=log)
        self._check(done)

    def _ask(self, command: Sequence[str]) -> str:
        """Run a command, and return what it prints.

        Raises:
            EngineError: it failed.
        """
        with self.log.open("ab") as log:
            done = self._start(command, stdout=subprocess.PIPE, stderr=log)
        self._check(done)
        return done.stdout

    def _start(
        self, command: Sequence[str], stdout: int | IO[bytes], stderr: IO[bytes]
    ) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **self._recipe.build}
        return subprocess.run(  # noqa: S603
            command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, env=environment, text=True
        )

    def _check(self, done: subprocess.CompletedProcess[str]) -> None:
        if done.returncode != 0:
            raise EngineError(f"{self._name} cannot be installed: {self._reason()} (all of it: {self.log})")

    def _reason(self) -> str:
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR: ")]
        return (errors or lines or ["it gave no reason"])[-1].removeprefix("ERROR: ")

    def _written(self) -> dict[str, object]:
        """What a ready environment says of itself; it does not outlive the interpreter that made it."""
        found: dict[str, object] = json.loads(json.dumps(asdict(self._recipe)))
        return {"python": sys.version, **found}


def root() -> Path:
    """Where environments lie: `apiary/peers` in the user's cache directory."""
    return user_cache() / "peers"
