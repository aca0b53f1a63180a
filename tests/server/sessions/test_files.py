"""What is special about snapshots in files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from apiary_server.sessions.files import SnapshotFiles
from apiary_server.sessions.store import StoreError


def test_files_are_for_this_user_alone(tmp_path: Path) -> None:
    files = SnapshotFiles(tmp_path / "snapshots")
    files.write("a", [b"one"])
    assert (tmp_path / "snapshots").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "snapshots" / "a").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("step", ["write", "fsync", "rename"])
def test_a_failure_leaves_what_was_there(tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = SnapshotFiles(tmp_path)
    files.write("a", [b"before"])

    def fail(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(StoreError, match="No space left"):
            files.write("a", [b"after"])
        with pytest.raises(StoreError):
            files.write("b", [b"new"])
    assert files.read("a", 10) == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_a_killed_process_left_is_taken_away(tmp_path: Path) -> None:
    files = SnapshotFiles(tmp_path)
    (tmp_path / "a.unfinished").write_bytes(b"half")
    files.write("b", [b"one"])
    assert files.names() == {"b": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    (tmp_path / "a.unfinished").write_bytes(b"half of what was longer")
    files.write("a", [b"one"])
    assert files.read("a", 99) == b"one"


def test_what_cannot_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file"):
        SnapshotFiles(tmp_path / "file" / "snapshots")
    files = SnapshotFiles(tmp_path / "gone" / "snapshots")
    (tmp_path / "gone" / "snapshots").rmdir()
    (tmp_path / "gone").rmdir()
    for failing in (files.names, lambda: files.write("a", [b""])):
        with pytest.raises(StoreError, match="No such file"):
            failing()
    assert files.read("a", 10) is None


def test_a_directory_that_was_taken_away_is_made_again(tmp_path: Path) -> None:
    directory = tmp_path / "snapshots"
    files = SnapshotFiles(directory)
    files.write("a", [b"one"])
    shutil.rmtree(directory)
    for _ in range(2):
        files.write("b", [b"two"])
    assert files.names() == {"b": 3}
    assert directory.stat().st_mode & 0o077 == 0


def test_nothing_is_written_to_another_worker_s(tmp_path: Path) -> None:
    files = SnapshotFiles(tmp_path / "snapshots")
    (tmp_path / "snapshots").rename(tmp_path / "moved")
    other = SnapshotFiles(tmp_path / "snapshots")
    with pytest.raises(StoreError, match="put that back"):
        files.write("a", [b"one"])
    other.write("b", [b"two"])
    assert other.names() == {"b": 3}
