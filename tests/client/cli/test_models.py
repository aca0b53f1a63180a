"""`apiary models`: the front of the catalogue, which has its own tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from apiary_client.cli.app import app
from apiary_server.model import catalog

Invoke = Callable[..., Result]


@pytest.fixture
def invoke() -> Invoke:
    """Run the command in this process."""
    return lambda *arguments: CliRunner(env={"COLUMNS": "200"}).invoke(app, ["models", *arguments])


def test_pull_prints_the_directory_and_shows_progress(
    monkeypatch: pytest.MonkeyPatch, invoke: Invoke, tmp_path: Path
) -> None:
    asked = []

    def pull(name: str, cache_dir: Path | None, progress: catalog.Progress) -> Path:
        asked.append((name, cache_dir))
        progress("download", 0, 100)
        progress("download", 100, 100)
        progress("convert", 0, None)
        return tmp_path / name

    monkeypatch.setattr(catalog, "pull", pull)
    result = invoke("pull", "--cache-dir", str(tmp_path))
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path}/smollm2-135m\n")
    assert asked == [("smollm2-135m", tmp_path)]
    assert "download smollm2-135m" in result.stderr
    assert "convert smollm2-135m" in result.stderr


def test_what_cannot_be_pulled_is_told(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("pull", "nobodys-model", "--cache-dir", str(tmp_path))
    assert (result.exit_code, result.stdout) == (1, "")
    assert "no model is named 'nobodys-model': known are smollm2-135m" in result.stderr


def test_list(monkeypatch: pytest.MonkeyPatch, invoke: Invoke, tmp_path: Path) -> None:
    assert "not here: apiary models pull smollm2-135m" in invoke("list", "--cache-dir", str(tmp_path)).stdout
    assert json.loads(invoke("list", "--json", "--cache-dir", str(tmp_path)).stdout) == []
    model = catalog.InstalledModel("smollm2-135m", tmp_path, 541_600_000)
    monkeypatch.setattr(catalog, "installed", lambda cache_dir: [model])
    said = invoke("list").stdout
    assert "541.6 MB" in said
    assert "not here" not in said
    assert json.loads(invoke("list", "--json").stdout) == [
        {"name": "smollm2-135m", "path": str(tmp_path), "size_bytes": 541_600_000}
    ]
