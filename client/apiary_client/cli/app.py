"""The command's frame: groups, `--version`, and the entry point."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from apiary_client.cli import bench, chat, console, generate, models, serve, sessions, status

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=console.examples(
        "apiary models pull        fetch the default model, once",
        "apiary serve              start a worker",
        "apiary chat               talk to it",
    ),
)


def _version(wanted: bool) -> None:
    if wanted:
        console.out.print(f"apiary {version('apiary')}")
        raise typer.Exit


@app.callback()
def apiary(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Serve language models over gRPC, with a bounded cache for every chat session, and talk to them."""


serve.register(app)
chat.register(app)
generate.register(app)
status.register(app)
app.add_typer(sessions.app, name="sessions")
app.add_typer(models.app, name="models")
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Run the command."""
    app(prog_name="apiary")
