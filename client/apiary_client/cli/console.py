"""What the commands print: answers and tables on stdout, everything else on stderr, errors as one line."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict, is_dataclass
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from apiary_client import errors
from apiary_client.types import Delta, Usage

# Names and texts from outside are printed as they are: no markup.
out = Console(highlight=False, markup=False, emoji=False)
_wide = Console(highlight=False, markup=False, emoji=False, width=1000)
err = Console(stderr=True, highlight=False, markup=False, emoji=False)

_CONTROLS = re.compile("[\x7f-\x9f]")  # those that JSON leaves as they are


def write(text: str) -> None:
    """Print text as it is, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def answer(deltas: Generator[Delta]) -> Usage | None:
    """Print an answer as it comes and return what it cost; whatever ends it, its line is ended too."""
    usage = None
    begun = False
    with closing(deltas):
        try:
            for delta in deltas:
                begun = True
                write(delta.text)
                usage = delta.usage
        finally:
            if begun:
                write("\n")
    return usage


def table(rows: Table) -> None:
    """Print a table: fitted to a terminal, one line a row for a pipe."""
    (out if out.is_terminal else _wide).print(rows)


def facts(*rows: tuple[str, str | Text]) -> Table:
    """A table of labels and values."""
    table = Table.grid(padding=(0, 2))
    for label, value in rows:
        table.add_row(Text(label, style="dim"), value)
    return table


def note(text: str) -> None:
    """Print a remark for people on stderr."""
    err.print(Text(text, style="dim"), soft_wrap=True)


def complain(message: str) -> None:
    """Print one red line on stderr."""
    err.print(Text(f"error: {' '.join(message.split())}", style="red"), soft_wrap=True)


def fail(message: str, code: int = 1) -> NoReturn:
    """Complain and end the command."""
    complain(message)
    raise typer.Exit(code)


def explain(error: errors.ApiaryError, target: str) -> str:
    """Return an error's message with what to do about it."""
    hint = _hint(error, target)
    return f"{error.message} ({hint})" if hint else error.message


def _hint(error: errors.ApiaryError, target: str) -> str | None:
    match error:
        case errors.Unavailable(reason=None):
            return f"is a worker running at {target}? start one with `apiary serve`, or name it with --target"
        case errors.SessionNotFound():
            return "`apiary sessions list` shows yours"
        case errors.SessionExists():
            return "choose another name"
        case errors.SessionBusy():
            return "wait until its other turn ends"
        case errors.DeadlineExceeded():
            return "allow it more with --timeout"
        case errors.MethodNotImplemented(reason=None):
            return f"is {target} an Apiary worker?"
    if error.retry_after is not None:
        return f"try again in {error.retry_after:g} s"
    return None


def json_text(value: object) -> str:
    """Return dataclasses, lists and dictionaries of them as JSON for programs. No terminal obeys it."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=_json_form)
    return _CONTROLS.sub(lambda sign: f"\\u{ord(sign[0]):04x}", text)


def _json_form(value: object) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    match value:
        case datetime():
            return value.isoformat()
        case Path():
            return str(value)
        case Enum():
            return value.value
    raise TypeError(f"{type(value).__name__} has no JSON form")


def examples(*lines: str) -> str:
    """Return a help epilog with one example a line."""
    return "\n\n".join(("[bold]Examples[/bold]", *lines))
