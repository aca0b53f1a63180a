"""`apiary bench resume`: how soon a session answers after its worker was started again."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from apiary_client.cli import console
from apiary_client.cli.bench.options import (
    Backend,
    CacheDtype,
    JsonFile,
    Model,
    Policy,
    Repeats,
    Threads,
    Weights,
)
from apiary_client.cli.bench.own import Directory, flags, measured
from apiary_client.cli.server_extra import server_extra


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog=console.examples(
            "apiary bench resume",
            "apiary bench resume --history 6000 --policy 'full(bound=8192)' --kill --json resume.json",
        )
    )(resume)


def resume(
    context: typer.Context,
    history: Annotated[
        int, typer.Option(min=1, metavar="TOKENS", help="Of the session when its worker ends.")
    ] = 3000,
    input: Annotated[int, typer.Option(min=1, metavar="TOKENS", help="Of each measured turn.")] = 32,
    turns: Annotated[int, typer.Option(min=1, metavar="N", help="Warm turns of each session.")] = 10,
    others: Annotated[
        int, typer.Option(min=0, metavar="N", help="Sessions of the same length that come back before it.")
    ] = 0,
    repeats: Repeats = 5,
    kill: Annotated[
        bool, typer.Option("--kill", help="End workers by SIGKILL, once the snapshot is there.")
    ] = False,
    directory: Directory = None,
    json: JsonFile = None,
    model: Model = None,
    policy: Policy = None,
    weights: Weights = None,
    backend: Backend = None,
    cache_dtype: CacheDtype = None,
    snapshot_bits: Annotated[
        Literal["2", "4"] | None,
        typer.Option(help="Of most entries in snapshots; default exact.", rich_help_panel="Worker"),
    ] = None,
    threads: Threads = None,
) -> None:
    """How soon a session answers after its worker was started again.

    Starts workers of its own, one after the other, on one state directory. For each repeat: one takes a new
    session's history, and ends. The next takes the session's next turn, sent when its ready line is there,
    by a new connection; its cache comes from the snapshot. Then that is deleted, and the worker after that
    takes a turn for which it has to compute the cache anew, and then the warm turns, each when the last one's
    snapshot is there.

    First token: from the request to it, for the client, over gRPC. Cached tokens and rebuild reason are what
    the answers say of themselves: the command fails, without a report, if a cache was computed that should
    have come from a snapshot, or the other way round.

    Files that were just written are read from the system's memory: a machine that was started again is slower
    by the time that its disk takes for one snapshot.
    """
    with server_extra("bench"):
        from apiary_bench import document
        from apiary_bench.resume import report, run

        plan = run.Plan(history=history, input=input, turns=turns, others=others, repeats=repeats, kill=kill)
        if json is not None:
            document.require(json)
        found = measured(lambda bars: run.run(plan, flags(context), bars, directory))
        console.write(f"{report.heading(plan, found)}\n")
        console.table(report.first_tokens(found))
        console.table(report.ratios(found))
        if json is not None:
            document.write(json, report.document(plan, flags(context), found))
