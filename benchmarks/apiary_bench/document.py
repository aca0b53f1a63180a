"""What a benchmark found, as a JSON file."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from apiary_bench.errors import BenchError


def provenance(*distributions: str) -> dict[str, Any]:
    """How a document came to be: the command, the date, and the versions of these installed distributions."""
    return {
        "command": shlex.join(["apiary", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in distributions},
    }


def require(path: Path) -> None:
    """Check before a long run that `write` can write there after it.

    Raises:
        BenchError: it cannot.
    """
    if path.is_dir():
        raise BenchError(f"{path} is a directory: name a file")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise BenchError(f"{path} cannot be written: {path.parent} is no directory, or not writable")


def write(path: Path, content: dict[str, Any]) -> None:
    """Write JSON, whole or not at all.

    Raises:
        BenchError: it cannot be written.
    """
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        Path(file.name).chmod(0o644)
        Path(file.name).replace(path)
    except OSError as error:
        raise BenchError(f"{path} cannot be written: {error}") from error
