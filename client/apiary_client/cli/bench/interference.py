"""`apiary bench interference`: a long prompt beside running streams, on a running worker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apiary_client import aio
from apiary_client.cli import console
from apiary_client.cli.bench.bars import Bars
from apiary_client.cli.bench.stopping import cancel_on_signals
from apiary_client.cli.options import (
    DEFAULT_TARGET,
    Policy,
    Target,
    Tenant,
    Tls,
    TlsRootFile,
    explained,
    made,
)
from apiary_client.cli.server_extra import server_extra

if TYPE_CHECKING:
    from apiary_bench.serving.interference import Interference, Scene


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog=console.examples(
            "apiary bench interference",
            "apiary bench interference --streams 15 --prompt 4000 --repeats 5 --json interference.json",
        )
    )(interference)


def interference(
    streams: Annotated[int, typer.Option(metavar="N", help="Sessions that stream answers.")] = 15,
    history: Annotated[int, typer.Option(metavar="TOKENS", help="Given to each of them before.")] = 600,
    prompt: Annotated[int, typer.Option(metavar="TOKENS", help="The long prompt.")] = 4000,
    quiet: Annotated[
        int, typer.Option(metavar="TOKENS", help="Tokens of each stream before the prompt comes.")
    ] = 64,
    repeats: Annotated[int, typer.Option(metavar="N", help="Times, after one that does not count.")] = 5,
    policy: Policy = None,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all times and the medians there.")
    ] = None,
    target: Target = DEFAULT_TARGET,
    tenant: Tenant = None,
    tls: Tls = False,
    tls_root_file: TlsRootFile = None,
) -> None:
    """Measure what a long prompt costs those who stream beside it, and what they cost it.

    Slowdown: p99 of the streams' inter-token latencies from the prompt's request to its first token, over
    their p99 before it. Wait: the prompt's time to first token beside the streams over that alone. Both of
    each time, and the medians. The worker should have nothing else to do.
    """
    with server_extra("bench"), explained(target):
        from apiary_bench import document
        from apiary_bench.serving import report
        from apiary_bench.serving.interference import Scene

        scene = Scene(
            streams=streams, history=history, prompt=prompt, quiet=quiet, repeats=repeats, policy=policy
        )
        if json is not None:
            document.require(json)

        def connect() -> aio.Client:
            return made(aio.Client, target, tenant, tls, tls_root_file)

        try:
            found = asyncio.run(_run(scene, connect))
        except (KeyboardInterrupt, asyncio.CancelledError):
            console.note("stopped; nothing is reported")
            raise typer.Exit(130) from None
        console.write(f"{report.interference_heading(scene, found)}\n")
        console.table(report.interference(found))
        if json is not None:
            document.write(json, report.interference_document(scene, found))


async def _run(scene: Scene, connect: Callable[[], aio.Client]) -> Interference:
    from apiary_bench.serving import interference

    cancel_on_signals()
    with Bars() as bars:
        async with connect() as client:
            return await interference.run(scene, client, bars)
