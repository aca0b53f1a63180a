"""What commands that start workers of their own have in common."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

import typer

from apiary_client.cli import console
from apiary_client.cli.bench.bars import Bars
from apiary_client.cli.bench.stopping import cancel_on_signals

_WORKER = ("model", "policy", "weights", "backend", "cache_dtype", "snapshot_bits", "threads")

_Found = TypeVar("_Found")

Directory: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        exists=True,
        file_okay=False,
        writable=True,
        help="Store sessions there, and delete them at the end: the disk that is measured. "
        "[dim]\\[default: where temporary files are][/dim]",
        show_default=False,
    ),
]


def flags(context: typer.Context) -> dict[str, str]:
    """The flags of `apiary serve` that the command was given."""
    given = {name: context.params.get(name) for name in _WORKER}
    return {f"--{name.replace('_', '-')}": str(value) for name, value in given.items() if value is not None}


def measured(measure: Callable[[Bars], Coroutine[Any, Any, _Found]]) -> _Found:
    """Run a measurement to its end; Ctrl-C and SIGTERM end the command, and nothing is reported."""

    async def run() -> _Found:
        cancel_on_signals()
        with Bars() as bars:
            return await measure(bars)

    try:
        return asyncio.run(run())
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.note("stopped; nothing is reported")
        raise typer.Exit(130) from None
