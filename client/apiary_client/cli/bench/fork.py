"""`apiary bench fork`: what forks of a session cost, and that all of them answer."""

from __future__ import annotations

from typing import Annotated

import typer

from apiary_client.cli import console
from apiary_client.cli.bench.options import (
    Backend,
    CacheDtype,
    JsonFile,
    Model,
    Policy,
    Threads,
    Weights,
)
from apiary_client.cli.bench.own import Directory, flags, measured
from apiary_client.cli.server_extra import server_extra


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog=console.examples(
            "apiary bench fork",
            "apiary bench fork --forks 200 --holds 10 --policy 'full(bound=4096)' --json fork.json",
        )
    )(fork)


def fork(
    context: typer.Context,
    history: Annotated[int, typer.Option(min=1, metavar="TOKENS", help="Of the session.")] = 3000,
    forks: Annotated[int, typer.Option(min=1, metavar="N", help="Of it, made one after the other.")] = 100,
    holds: Annotated[
        int, typer.Option(min=2, metavar="N", help="Sessions that the worker's cache budget is made for.")
    ] = 20,
    input: Annotated[int, typer.Option(min=1, metavar="TOKENS", help="Of each next turn.")] = 32,
    output: Annotated[int, typer.Option(min=1, metavar="TOKENS", help="Of each next turn; greedy.")] = 8,
    concurrency: Annotated[int, typer.Option(min=1, metavar="N", help="Next turns at a time.")] = 16,
    directory: Directory = None,
    json: JsonFile = None,
    model: Model = None,
    policy: Policy = None,
    weights: Weights = None,
    backend: Backend = None,
    cache_dtype: CacheDtype = None,
    threads: Threads = None,
) -> None:
    """How long a fork of a session takes, and whether all of many forks answer.

    Starts workers of its own, one after the other, on a state directory: the first says how much memory a
    session takes, the second has a cache budget that holds just as many as --holds says. A session takes its
    history, and is forked, one fork after the other. Then it and all its forks take the same next turn.

    Fork: from the request to its answer, for the client, over gRPC; the fork is in the journal then. Its
    snapshot is made after that, beside the next ones. Beyond the budget: those for which another session
    had to leave the cache budget, to host memory or to its snapshot. Copied: the fork's cache, and those that
    were parked for it. First token: from the request to it; turns may have waited for each other's memory.

    The command fails, without a report, if a session does not answer, or with other tokens than the rest, or
    if its cache had to be computed anew.
    """
    with server_extra("bench"):
        from apiary_bench import document
        from apiary_bench.fork import report, run

        plan = run.Plan(
            history=history, forks=forks, holds=holds, input=input, output=output, concurrency=concurrency
        )
        if json is not None:
            document.require(json)
        found = measured(lambda bars: run.run(plan, flags(context), bars, directory))
        console.write(f"{report.heading(plan, found)}\n")
        console.table(report.forks(found))
        console.table(report.answers(plan, found))
        console.table(report.sessions(plan, found))
        if json is not None:
            document.write(json, report.document(plan, flags(context), found))
