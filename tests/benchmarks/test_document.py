"""Documents on disk."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import grpc
import pytest

from apiary_bench import document
from apiary_bench.errors import BenchError


def test_what_a_document_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/bin/apiary", "bench", "serve", "--policy", "buzz(window=9)"])
    found = document.provenance("grpcio")
    assert shlex.split(found["command"]) == ["apiary", "bench", "serve", "--policy", "buzz(window=9)"]
    assert set(found["versions"]) == {"python", "grpcio"}
    assert found["versions"]["grpcio"] == grpc.__version__


def test_a_document_replaces_another_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content in ({"a": 1}, {"b": [0.5, None]}):
        document.require(path)
        document.write(path, content)
        assert json.loads(path.read_text()) == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["", "none/a.json"])
def test_where_none_can_be_written(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with pytest.raises(BenchError, match="is a directory" if name == "" else "is no directory"):
        document.require(path)
    with pytest.raises(BenchError, match="cannot be written"):
        document.write(path, {})
