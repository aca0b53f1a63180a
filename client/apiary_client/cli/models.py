"""`apiary models`: the models of this machine. Needs the server extra, but neither a worker nor torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from apiary_client.cli import console
from apiary_client.cli.options import Json
from apiary_client.cli.server_extra import server_extra

app = typer.Typer(no_args_is_help=True, help="Fetch models, and list what is here.")

CacheDir = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Where models lie; default $APIARY_CACHE_DIR or the user's cache."),
]


@app.command(epilog=console.examples("apiary models pull", "apiary models pull smollm2-135m"))
def pull(
    name: Annotated[str, typer.Argument(help="A known name, or a hub id such as org/name.")] = "smollm2-135m",
    cache_dir: CacheDir = None,
) -> None:
    """Fetch a model, check it and convert it, once; prints its directory."""
    with server_extra():
        from apiary_server.model import catalog

        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=console.err,
        ) as bars:
            path = catalog.pull(name, cache_dir, _Report(bars, name))
    console.write(f"{path}\n")


@app.command("list", epilog=console.examples("apiary models list", "apiary models list --json"))
def list_(json: Json = False, cache_dir: CacheDir = None) -> None:
    """List known models and those that are installed."""
    with server_extra():
        from apiary_server.model import catalog

        installed = catalog.installed(cache_dir)
        missing = sorted(set(catalog.known()) - {model.name for model in installed})
    if json:
        console.write(console.json_text(installed) + "\n")
        return
    table = Table("model", "size", Column("directory", overflow="fold"))
    for model in installed:
        table.add_row(model.name, decimal(model.size_bytes), str(model.path))
    for name in missing:
        table.add_row(name, "", Text(f"not here: apiary models pull {name}", style="dim"))
    console.table(table)


class _Report:
    """Shows the stages of a pull, one bar each; a stage is over when the next one starts."""

    def __init__(self, bars: Progress, name: str) -> None:
        self._bars = bars
        self._name = name
        self._stages: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        if stage not in self._stages:
            for task in self._bars.tasks:
                self._bars.update(task.id, total=task.total or 1, completed=task.total or 1)
            self._stages[stage] = self._bars.add_task(f"{stage} {self._name}", total=total)
        self._bars.update(self._stages[stage], completed=done, total=total)
