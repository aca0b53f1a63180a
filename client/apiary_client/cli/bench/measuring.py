"""What measurements of the worker's own code have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING

import typer

from apiary_client.cli import console
from apiary_client.cli.bench.bars import Bars

if TYPE_CHECKING:
    from apiary_bench.engine.workbench import Workbench


def workbench(context: typer.Context) -> Workbench:
    """Load the model that the command's options name. It needs the benchmarks' extra."""
    from apiary_bench.engine.workbench import Setup, Workbench

    return Workbench(Setup(**{field.name: context.params[field.name] for field in fields(Setup)}))


@contextmanager
def measuring() -> Iterator[Bars]:
    """Show how far a measurement is; Ctrl-C ends the command, and nothing is reported."""
    try:
        with Bars() as bars:
            yield bars
    except KeyboardInterrupt:
        console.note("stopped; nothing is reported")
        raise typer.Exit(130) from None
