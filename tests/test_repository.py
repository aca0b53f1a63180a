"""The house's rules: who may import whom, what is generated is fresh, what is packaged is consistent."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

PACKAGES = {"buzz": ROOT / "buzz"} | {
    name: ROOT / "server" / "apiary_server" / name for name in ("sessions", "model", "engine", "rpc")
}
MAY_IMPORT = {  # of our own; rpc -> engine -> sessions, model -> buzz
    "buzz": {"buzz"},
    "sessions": {"sessions", "buzz", "words", "threads"},
    "model": {"model", "sessions", "buzz", "words"},
    "engine": {"engine", "model", "sessions", "buzz", "words"},
    "rpc": {"rpc", "engine", "sessions", "words", "settings", "telemetry", "apiary.v1"},
}
WORDS = {  # what every layer of the worker shares
    "apiary_server.errors",
    "apiary_server.limits",
}


def modules(directory: Path) -> list[Path]:
    found = sorted(directory.rglob("*.py"))
    assert found, f"no modules in {directory}"
    return found


def imports(path: Path) -> Iterator[str]:
    """Everything that a file imports, at whatever depth, as dotted names (`from a import b` is `a.b`)."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(name: str) -> str | None:
    """The part of ours that a dotted name belongs to, or None for a library."""
    parts = name.split(".")
    if parts[0] == "apiary_server":
        return "words" if any(name == word or name.startswith(f"{word}.") for word in WORDS) else parts[1]
    if parts[:2] == ["apiary", "v1"]:
        return "apiary.v1"
    return parts[0] if parts[0] in {"buzz", "apiary_client"} else None


def offences(directory: Path, *forbidden: str) -> list[str]:
    """Imports in `directory` of these modules or anything below them."""
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(directory)
        for name in imports(path)
        if any(f"{name}.".startswith(f"{module}.") for module in forbidden)
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_import_directions(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(PACKAGES[package])
        for name in imports(path)
        if layer(name) is not None and layer(name) not in MAY_IMPORT[package]
    ]
    assert wrong == []


def test_the_shared_words_import_nothing_heavy() -> None:
    for word in WORDS:
        path = ROOT / "server" / Path(*word.split(".")).with_suffix(".py")
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & {"torch", "grpc", "google", "transformers", "apiary", "buzz"}, path


@pytest.mark.parametrize("package", ["sessions", "model", "engine"])
def test_only_rpc_knows_grpc_and_protobuf(package: str) -> None:
    assert offences(PACKAGES[package], "grpc", "grpc_status", "google", "apiary.v1") == []


def test_buzz_needs_torch_alone() -> None:
    allowed = set(sys.stdlib_module_names) | {"torch", "buzz"}
    for path in modules(ROOT / "buzz"):
        if path.parent.name == "hf":  # the drop-in for transformers, which the package does not import
            continue
        assert {name.split(".")[0] for name in imports(path)} <= allowed, path


def test_the_scheduler_needs_no_torch() -> None:
    for name in ("scheduler.py", "step.py", "request.py", "result.py"):
        path = PACKAGES["engine"] / name
        assert not {root.split(".")[0] for root in imports(path)} & {"torch", "transformers"}, path


def test_nothing_unpickles() -> None:
    for directory in (ROOT / "buzz", ROOT / "server", ROOT / "client"):
        assert offences(directory, "pickle", "dill", "cloudpickle", "marshal", "shelve", "torch.load") == []
        for path in modules(directory):
            assert not re.search(r"torch\.load\(|trust_remote_code\s*=\s*True", path.read_text()), path


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("apiary_client", {"torch", "transformers", "numpy", "apiary_server", "buzz", "typer"}),
        ("apiary_client.aio", {"torch", "transformers", "numpy", "apiary_server", "buzz", "typer"}),
        ("apiary_client.cli", {"torch", "transformers", "numpy", "apiary_server", "buzz"}),
        ("apiary_bench.serving.report", {"torch", "transformers", "numpy", "buzz", "pydantic"}),
        ("buzz", {"grpc", "google.protobuf", "transformers", "apiary_server", "apiary_client"}),
        ("apiary_server.settings", {"torch", "transformers", "grpc"}),
        ("apiary_server.model.catalog", {"torch", "transformers", "grpc"}),
    ],
)
def test_what_an_import_leaves_out(module: str, absent: set[str]) -> None:
    code = f"import sys, json, {module}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    loaded = set(json.loads(done.stdout))
    assert module in loaded
    assert loaded & absent == set()


def test_the_generated_protobuf_code_is_fresh() -> None:
    done = subprocess.run(
        [ROOT / "scripts" / "protos.sh", "--check"],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def requirements(extra: str | None) -> dict[str, Requirement]:
    project = PYPROJECT["project"]
    lines = project["dependencies"] if extra is None else project["optional-dependencies"][extra]
    parsed = [Requirement(line) for line in lines]
    return {requirement.name: requirement for requirement in parsed}


def test_the_client_installs_without_the_server() -> None:
    base = requirements(None)
    assert set(base) == {
        "grpcio",
        "grpcio-status",
        "protobuf",
        "googleapis-common-protos",
        "typer",
        "rich",
    }
    assert str(requirements("server")["torch"].specifier) in {"<2.14,>=2.13", ">=2.13,<2.14"}


def test_what_is_packaged_exists() -> None:
    project = PYPROJECT["project"]
    for path in [project["readme"], *project["license-files"]]:
        assert (ROOT / path).is_file()
    for path in PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        assert any((ROOT / path).rglob("*.py")), path
        if path != "proto/apiary":
            assert (ROOT / path / "py.typed").is_file()
    assert "Apache License" in (ROOT / "LICENSE").read_text()


@pytest.mark.parametrize("path", ["Makefile", ".ci/run", "scripts/setup.sh", "scripts/protos.sh"])
def test_shell_parses(path: str) -> None:
    file = ROOT / path
    if path == "Makefile":
        command = ["make", "--dry-run", "--file", str(file), "chat", "test", "serve", "image", "clean"]
    else:
        assert os.access(file, os.X_OK), f"{path} is not executable"
        command = ["bash", "-n", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


def test_make_help_lists_every_target() -> None:
    targets = set(re.findall(r"^\.PHONY: (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE))
    # of the `make test` that runs this
    environment = {key: value for key, value in os.environ.items() if key not in {"MAKEFLAGS", "MAKELEVEL"}}
    done = subprocess.run(
        ["make"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=30
    )
    assert {line.split()[1] for line in done.stdout.splitlines()} == targets
    assert {"setup", "chat", "serve", "test", "lint", "format", "proto", "image", "clean"} <= targets
