"""`apiary bench`: measurements, one file a command."""

from __future__ import annotations

import typer

from apiary_client.cli.bench import engine, fork, interference, peers, quality, resume, roofline, serve

app = typer.Typer(no_args_is_help=True, help="Measure.")


@app.callback()
def bench() -> None:
    """Measure."""


serve.register(app)
engine.register(app)
roofline.register(app)
resume.register(app)
fork.register(app)
interference.register(app)
quality.register(app)
peers.register(app)
