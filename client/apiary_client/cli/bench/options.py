"""Options that measurements of the worker's own code share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeAlias, TypeVar

import typer

from apiary_client.cli import console

_WORKER = "Worker"

_Number = TypeVar("_Number", int, float)

Model: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|PATH",
        help="A pulled model or a directory; default smollm2-135m.",
        rich_help_panel=_WORKER,
    ),
]
Policy: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC", help="Cache policy of the sessions; default buzz2.", rich_help_panel=_WORKER
    ),
]
Weights: TypeAlias = Annotated[
    Literal["fp32", "int8"] | None,
    typer.Option(help="Precision of the weights; default fp32.", rich_help_panel=_WORKER),
]
Backend: TypeAlias = Annotated[
    Literal["auto", "reference", "cpu", "cuda"] | None,
    typer.Option(help="What computes; default auto, the fastest.", rich_help_panel=_WORKER),
]
CacheDtype: TypeAlias = Annotated[
    Literal["float32", "bfloat16", "float16", "int8"] | None,
    typer.Option(help="Data type of the cache; default float32.", rich_help_panel=_WORKER),
]
StepTokens: TypeAlias = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Most tokens in a step; default 256.", rich_help_panel=_WORKER),
]
CacheBudget: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory for all caches; default as much as the sessions need, so that none waits.",
        rich_help_panel=_WORKER,
    ),
]
Threads: TypeAlias = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Threads of torch; default torch's choice.", rich_help_panel=_WORKER
    ),
]
Sessions: TypeAlias = Annotated[
    str, typer.Option(metavar="N,...", help="Numbers of sessions, measured one after the other.")
]
Repeats: TypeAlias = Annotated[int, typer.Option(min=1, metavar="N", help="Measurements; medians count.")]
JsonFile: TypeAlias = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write all that was measured there.")
]


def numbers(option: str, text: str, kind: type[_Number]) -> list[_Number]:
    """Read one number or several with commas between; end the command where they are none."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        console.fail(f"{option} takes {what}, one or several with commas between, not {text!r}", code=2)


def counts(option: str, text: str) -> tuple[int, ...]:
    """The same of whole numbers from 1 on, none twice."""
    found = numbers(option, text, int)
    if min(found) < 1 or len(set(found)) < len(found):
        console.fail(f"{option} takes numbers of at least 1, each once, not {text!r}", code=2)
    return tuple(found)
