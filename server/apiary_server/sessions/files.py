"""Snapshots as files of a directory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from apiary_server.sessions.store import StoreError

_UNFINISHED = ".unfinished"


class SnapshotFiles:
    """As `SnapshotStore`, in a directory that one process uses at a time.

    A file is written under another name, fsynced, renamed, and its directory fsynced: whoever finds a name
    finds it whole. If the directory is taken away it is made again, in the one that it was in; nothing is
    written to another that has its name.

    Args:
        directory: it is made if it is missing, for this user alone.

    Raises:
        StoreError: it cannot be made.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        with self._explained():
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._opened = directory.stat()

    def names(self) -> Mapping[str, int]:
        """As `SnapshotStore.names`."""
        names = {}
        with self._explained(), os.scandir(self._directory) as entries:
            for entry in entries:
                if entry.name.endswith(_UNFINISHED):
                    os.unlink(entry.path)
                elif entry.is_file(follow_symlinks=False):
                    names[entry.name] = entry.stat(follow_symlinks=False).st_size
        return names

    def write(self, name: str, parts: Sequence[bytes]) -> None:
        """As `SnapshotStore.write`."""
        path, unfinished = self._directory / name, self._directory / f"{name}{_UNFINISHED}"
        with self._explained():
            self._check_place()
            try:
                with open(unfinished, "wb", buffering=0, opener=_private) as file:
                    for part in parts:
                        _write_all(file.fileno(), part)
                    os.fsync(file.fileno())
                os.rename(unfinished, path)
                sync(self._directory)
            except BaseException:
                with contextlib.suppress(OSError):
                    unfinished.unlink(missing_ok=True)
                raise

    def read(self, name: str, most: int) -> bytes | None:
        """As `SnapshotStore.read`."""
        with self._explained():
            try:
                with open(self._directory / name, "rb") as file:
                    return file.read(min(most, os.fstat(file.fileno()).st_size))
            except FileNotFoundError:
                return None

    def delete(self, name: str) -> None:
        """As `SnapshotStore.delete`."""
        with self._explained():
            (self._directory / name).unlink(missing_ok=True)

    def close(self) -> None:
        """As `SnapshotStore.close`: nothing is open."""

    def _check_place(self) -> None:
        try:
            there = os.path.samestat(self._directory.stat(), self._opened)
        except FileNotFoundError:
            self._directory.mkdir(mode=0o700)
            sync(self._directory.parent)
            self._opened = self._directory.stat()
        else:
            if not there:
                raise StoreError(
                    f"{self._directory} is another directory than the one that was opened: put that "
                    "back, or start the worker anew"
                )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(f"{self._directory}: {error.strerror or error}") from error


def sync(directory: Path) -> None:
    """Have the names in a directory outlive the machine's power."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _write_all(file: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]
