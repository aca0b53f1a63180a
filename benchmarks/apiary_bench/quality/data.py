"""Reading evaluation data: a missing or malformed file is a clear error."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from apiary_bench.errors import DataError


def text(directory: Path, name: str) -> str:
    """A text file, whole.

    Raises:
        DataError: it is missing, cannot be read, or is no UTF-8.
    """
    path = directory / name
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path} is missing: --data names the directory of the evaluation files") from None
    except (OSError, UnicodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def rows(directory: Path, name: str, fields: Mapping[str, type]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a JSON Lines file, each with its place for messages; empty lines are skipped.

    Args:
        directory: of the data.
        name: of the file.
        fields: what every row must have, and of which type; strings and lists must not be empty.

    Raises:
        DataError: the file is missing or empty, or a row is malformed; the message gives file and line.
    """
    empty = True
    for number, line in enumerate(text(directory, name).splitlines(), 1):
        if not line.strip():
            continue
        place = f"{directory / name}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{place} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{place} is no JSON object")
        for field, kind in fields.items():
            check(place, field, row.get(field), kind)
        empty = False
        yield place, row
    if empty:
        raise DataError(f"{directory / name} has no rows")


def check(place: str, field: str, value: object, kind: type) -> None:
    """Require a value of a type, not empty.

    Raises:
        DataError: it is not.
    """
    if type(value) is not kind:
        found = "missing" if value is None else f"a {type(value).__name__}"
        raise DataError(f"{place}: {field!r} must be a {kind.__name__}, but is {found}")
    if isinstance(value, (str, list)) and not value:
        raise DataError(f"{place}: {field!r} is empty")
