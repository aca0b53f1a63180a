"""Finished documents on disk, so that a run that was stopped goes on."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from apiary_bench.errors import BenchError
from apiary_bench.quality.tasks.task import Outcome


class Journal:
    """An append-only JSON Lines file of outcomes by key and document.

    A line is on the disk before the next document begins. A torn last line, from a process that was killed,
    is dropped when the file is opened. Lines of other keys stay.

    Args:
        path: of the file; None keeps nothing.

    Raises:
        BenchError: the file cannot be read or written, or is no journal.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._found: dict[tuple[str, int], list[Outcome]] = {}
        self._handle = None
        if path is None:
            return
        try:
            content = path.read_bytes() if path.exists() else b""
            whole = content[: content.rfind(b"\n") + 1]
            for number, line in enumerate(whole.splitlines(), 1):
                self._load(line, f"{path}:{number}")
            self._handle = path.open("ab")
            self._handle.truncate(len(whole))
        except OSError as error:
            raise BenchError(f"{path} cannot be kept: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            self._handle.close()

    def __getitem__(self, place: tuple[str, int]) -> list[Outcome]:
        """The outcomes by key and document.

        Raises:
            KeyError: there are none.
        """
        return self._found[place]

    def get(self, key: str, document: int) -> list[Outcome] | None:
        """The outcomes of a document that an earlier run finished."""
        return self._found.get((key, document))

    def put(self, key: str, document: int, outcomes: list[Outcome]) -> None:
        """Keep a document's outcomes.

        Raises:
            BenchError: the file cannot be written.
        """
        self._found[key, document] = outcomes
        if self._handle is None:
            return
        line = {"key": key, "document": document, "outcomes": [asdict(outcome) for outcome in outcomes]}
        try:
            self._handle.write(json.dumps(line).encode() + b"\n")
            self._handle.flush()
            os.fsync(self._handle.fileno())
        except OSError as error:
            raise BenchError(f"{self._path} cannot be written: {error}") from error

    def _load(self, line: bytes, place: str) -> None:
        try:
            row = json.loads(line)
            outcomes = [Outcome(**outcome) for outcome in row["outcomes"]]
            self._found[str(row["key"]), int(row["document"])] = outcomes
        except (ValueError, KeyError, TypeError) as error:
            raise BenchError(f"{place} is no line of a journal: move the file away to start anew") from error
