"""Virtual environments, with pip and venv replaced."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from apiary_bench.peers import environment
from apiary_bench.peers.engine import EngineError
from apiary_bench.peers.environment import Environment, Recipe

PLAIN = Recipe("engine", "1.0")
WHOLE = Recipe("engine-cpu", "2.0", torch="2.13.0", without=("torchvision",), build={"CMAKE_ARGS": "-DX=1"})


class Commands:
    """Takes the place of `subprocess.run`.

    Attributes:
        run: the commands, without the interpreter.
        environments: the variable CMAKE_ARGS of each.
        torch: the packages that pip would install for torch.
        failing: a part of the command that fails, after it has said why.
    """

    def __init__(self) -> None:
        self.run: list[list[str]] = []
        self.environments: list[str | None] = []
        self.torch = ["torch", "sympy"]
        self.failing: str | None = None

    def __call__(self, command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        self.run.append([part for part in command[1:] if part not in ("-E", "-P")])
        self.environments.append(options["env"].get("CMAKE_ARGS"))
        assert options["stdin"] == subprocess.DEVNULL
        if "venv" in command:
            Path(command[-1]).mkdir(exist_ok=True)
        if self.failing is not None and self.failing in command:
            options["stderr"].write(b"Collecting it\nERROR: No matching distribution\nhint: none\n")
            return subprocess.CompletedProcess(command, 1, "")
        return subprocess.CompletedProcess(command, 0, self._says(command))

    def _says(self, command: Sequence[str]) -> str:
        if "--dry-run" in command:
            return json.dumps({"install": [{"metadata": {"name": name}} for name in self.torch]})
        return "numpy\nnumba==0.65.0\n" if "-c" in command else ""

    @property
    def installs(self) -> list[list[str]]:
        """What pip was to install, with options of that kind alone."""
        common = {"--no-input", "--disable-pip-version-check", "--progress-bar", "off"}
        return [[part for part in run[3:] if part not in common] for run in self.run if run[1] == "pip"]


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    """No real pip."""
    fake = Commands()
    monkeypatch.setattr(environment.subprocess, "run", fake)
    return fake


def make(found: Environment) -> list[tuple[str, int, int]]:
    """Make it, and return what was heard."""
    heard: list[tuple[str, int, int]] = []
    found.make(lambda stage, done, total: heard.append((stage, done, total)))
    return heard


def test_a_plain_engine_is_installed_once(commands: Commands, tmp_path: Path) -> None:
    made = Environment("engine", PLAIN, tmp_path / "peers")
    assert not made.ready
    assert make(made) == [("install engine", 0, 2), ("install engine", 1, 2), ("install engine", 2, 2)]
    assert commands.run[0] == ["-m", "venv", "--clear", str(tmp_path / "peers" / "engine")]
    assert commands.installs == [["engine==1.0"]]
    assert made.ready
    assert make(Environment("engine", PLAIN, tmp_path / "peers")) == []
    assert len(commands.run) == 2


def test_another_version_is_installed_anew(commands: Commands, tmp_path: Path) -> None:
    make(Environment("engine", PLAIN, tmp_path))
    later = Environment("engine", Recipe("engine", "1.1"), tmp_path)
    assert not later.ready
    make(later)
    assert commands.installs == [["engine==1.0"], ["engine==1.1"]]


def test_torch_comes_first_and_what_must_not_come_is_left_out(commands: Commands, tmp_path: Path) -> None:
    made = Environment("engine", WHOLE, tmp_path)
    make(made)
    torch = "torch==2.13.0"
    assert commands.installs == [
        ["--dry-run", "--quiet", "--report", "-", torch],
        [torch],
        ["--no-deps", "engine-cpu==2.0"],
        ["numpy", "numba==0.65.0", torch],
    ]
    needs = next(run for run in commands.run if run[0] == "-c")
    assert needs[2:] == ["engine-cpu", "torch", "torchvision"]
    assert set(commands.environments) == {"-DX=1"}
    assert made.ready


def test_an_index_for_torch_serves_torch_alone(commands: Commands, tmp_path: Path) -> None:
    make(Environment("engine", WHOLE, tmp_path, "https://example.org/cpu"))
    index = ["--index-url", "https://example.org/cpu"]
    assert [run[-3:-1] == index for run in commands.installs] == [True, True, False, False]


@pytest.mark.parametrize("package", ["nvidia-cublas", "cuda-toolkit"])
def test_a_cuda_build_of_torch_is_not_taken(package: str, commands: Commands, tmp_path: Path) -> None:
    commands.torch = ["torch", package]
    made = Environment("engine", WHOLE, tmp_path)
    with pytest.raises(
        EngineError, match=f"a CUDA build of torch .1 packages such as {package}.*--torch-index"
    ):
        make(made)
    assert len(commands.installs) == 1
    assert "--dry-run" in commands.installs[0]
    assert not made.ready


def test_what_pip_says_is_told_and_the_rest_is_in_the_log(commands: Commands, tmp_path: Path) -> None:
    commands.failing = "engine==1.0"
    made = Environment("engine", PLAIN, tmp_path)
    with pytest.raises(EngineError, match=r"cannot be installed: No matching distribution \(all of it: "):
        make(made)
    assert "Collecting it" in made.log.read_text()
    assert not made.ready
    commands.failing = None
    make(made)
    assert made.ready


def test_where_none_can_be_made(commands: Commands, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EngineError, match="engine cannot be installed in"):
        make(Environment("engine", PLAIN, tmp_path / "file"))
    assert commands.run == []


def test_what_a_distribution_needs_leaves_out_extras_and_what_is_named(tmp_path: Path) -> None:
    metadata = tmp_path / "engine_cpu-2.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    needs = [
        "numpy>=2",
        "torch==2.13.0+cpu; platform_machine != 'none'",
        "torchvision",
        "never; python_version < '3'",
        "always>1; python_version > '3'",
        "plotly; extra == 'bench'",
    ]
    lines = ["Metadata-Version: 2.1", "Name: engine-cpu", "Version: 2.0"]
    metadata.write_text("\n".join(lines + [f"Requires-Dist: {need}" for need in needs]))
    done = subprocess.run(
        [sys.executable, "-c", environment._NEEDS, "engine-cpu", "torch", "torchvision"],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["numpy>=2", "always>1"]


def test_where_environments_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert environment.root() == tmp_path / "apiary" / "peers"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert environment.root() == Path.home() / ".cache" / "apiary" / "peers"
