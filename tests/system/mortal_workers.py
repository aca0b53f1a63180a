"""Workers that die where they are told to.

Run as `python -m tests.system.mortal_workers`. It imports all that a worker needs, which takes seconds, and
then forks a worker for each line that it reads: JSON with `arguments` (of `apiary serve`) and a `directory`
(for the files `out`, `err` and `fate`). It prints the worker's process id and, when that has ended, its exit
code.

As long as there is a file `fate`, with a number N and a point's name, the worker kills itself when it passes
that point for the N-th time.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sqlite3
import stat
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

POINTS = (
    "before write of the journal",
    "within a transaction",
    "before commit",
    "after commit",
    "after write of the journal",
    "before write",
    "half a write",
    "after write",
    "before fsync",
    "after fsync",
    "before rename",
    "after rename",
    "before fsync of the directory",
    "after fsync of the directory",
    "before delete",
    "after delete",
)


class Fate:
    """What the file says."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._passed = 0

    def passes(self, point: str) -> None:
        """The worker is there."""
        if self._is_next(point):
            self.dies()

    def dies(self) -> None:
        """In a moment: what its other threads say meanwhile has been said."""
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)

    def _is_next(self, point: str) -> bool:
        try:
            number, fatal = self._file.read_text().split(maxsplit=1)
        except FileNotFoundError:
            return False
        if fatal != point:
            return False
        self._passed += 1
        return self._passed == int(number)

    def write(self, file: int, data: Any) -> int:
        """As `os.write`, whole or half."""
        self.passes("before write")
        if self._is_next("half a write"):
            os.write(file, data[: len(data) // 2])
            self.dies()
        count = os.write(file, data)
        self.passes("after write")
        return count

    def fsync(self, file: int) -> None:
        """As `os.fsync`."""
        what = "fsync of the directory" if stat.S_ISDIR(os.fstat(file).st_mode) else "fsync"
        self.around(os.fsync, what)(file)

    def rename(self, old: Path, new: Path) -> None:
        """As `os.rename`."""
        self.around(os.rename, "rename")(old, new)

    def around(self, work: Callable[..., Any], what: str) -> Callable[..., Any]:
        """Some work, with a point before it and one after it."""

        def watched(*arguments: Any) -> Any:
            self.passes(f"before {what}")
            result = work(*arguments)
            self.passes(f"after {what}")
            return result

        return watched

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)  # it stands in for the module


def put_points(fate: Fate) -> None:
    """Have the stores' code pass the points."""
    from apiary_server.sessions import files, sqlite

    class Connection(sqlite3.Connection):
        def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
            execute = super().execute
            if statement == "COMMIT":
                execute = fate.around(execute, "commit")
            return execute(statement, *values)  # type: ignore[no-any-return]

    sqlite.sqlite3.connect = partial(sqlite3.connect, factory=Connection)  # type: ignore[assignment]
    files.os = fate  # type: ignore[assignment]
    for kind, method, what in (
        (sqlite.SqliteStore, "write", "write of the journal"),
        (files.SnapshotFiles, "delete", "delete"),
    ):
        whole = getattr(kind, method)
        setattr(kind, method, lambda *them, _whole=whole, _what=what: fate.around(_whole, _what)(*them))
    write = sqlite.SqliteStore._write

    def write_change(*arguments: Any) -> None:
        write(*arguments)
        fate.passes("within a transaction")

    sqlite.SqliteStore._write = write_change  # type: ignore[method-assign]


def die_with_parent() -> None:
    """Do not outlive a parent that is killed, where the system can see to that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def serve(directory: Path, arguments: list[str]) -> None:
    """Be the worker."""
    from apiary_client import cli

    for number, name in enumerate(("/dev/null", directory / "out", directory / "err")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    put_points(Fate(directory / "fate"))
    sys.argv = ["apiary", "serve", *arguments]
    cli.main()


def main() -> None:
    """Fork workers, one at a time."""
    die_with_parent()
    import tokenizers  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import apiary_server.main
    import apiary_server.worker  # noqa: F401

    for line in sys.stdin:
        order = json.loads(line)
        worker = os.fork()
        if not worker:
            try:
                os.setsid()
                die_with_parent()
                serve(Path(order["directory"]), order["arguments"])
            finally:
                os._exit(99)  # whatever happens, it is not the parent that goes on
        print(worker, flush=True)
        _, status = os.waitpid(worker, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
