"""`apiary bench serve`: a load on a running worker."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

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
    from apiary_bench.serving.generator import Connect, Run
    from apiary_bench.serving.workload import Workload

_WHEN = "Arrival"
_GOOD = "Objectives"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog=console.examples(
            "apiary bench serve --sessions 16 --turns 3 --history 3000 --json serve.json",
            "apiary bench serve --sessions 64 --rate 4 --slo-ttft 500 --slo-tpot 100",
            "apiary bench serve --policy 'buzz(window=300)' --cancel-rate 0.2 --seed 1",
        )
    )(serve)


def serve(
    sessions: Annotated[int, typer.Option(metavar="N", help="Conversations, all at the same time.")] = 16,
    turns: Annotated[int, typer.Option(metavar="N", help="Measured turns of each session.")] = 3,
    history: Annotated[
        int, typer.Option(metavar="TOKENS", help="Given to each session before; not measured.")
    ] = 0,
    input: Annotated[int, typer.Option(metavar="TOKENS", help="Input of each turn, random.")] = 32,
    output: Annotated[int, typer.Option(metavar="TOKENS", help="Output of each turn, exactly; greedy.")] = 32,
    policy: Policy = None,
    json: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write every request and the summary there."),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of all that is random.")] = 0,
    warmup: Annotated[
        int, typer.Option(metavar="TURNS", help="Of each session before the measured ones; not measured.")
    ] = 0,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="A turn that takes longer has failed.")
    ] = None,
    cancel_rate: Annotated[
        float, typer.Option(metavar="PART", help="Part of the turns that is cancelled midway, 0 to 1.")
    ] = 0.0,
    arrival: Annotated[
        Literal["closed", "poisson", "constant", "burst"] | None,
        typer.Option(
            help="When turns are sent; default closed (each after its session's last), with --rate poisson.",
            rich_help_panel=_WHEN,
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            metavar="R", help="Turns per second of all sessions, in an open loop.", rich_help_panel=_WHEN
        ),
    ] = None,
    think: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", help="Mean pause between turns in a closed loop.", rich_help_panel=_WHEN
        ),
    ] = 0.0,
    slo_ttft: Annotated[
        float | None, typer.Option(metavar="MS", help="Most TTFT of a good turn.", rich_help_panel=_GOOD)
    ] = None,
    slo_tpot: Annotated[
        float | None, typer.Option(metavar="MS", help="Most TPOT of a good turn.", rich_help_panel=_GOOD)
    ] = None,
    target: Target = DEFAULT_TARGET,
    tenant: Tenant = None,
    tenants: Annotated[
        int,
        typer.Option(
            metavar="N", help="Spread the sessions over TENANT-1 to -N.", rich_help_panel="Connection"
        ),
    ] = 1,
    tls: Tls = False,
    tls_root_file: TlsRootFile = None,
) -> None:
    """Put a load on a running worker and measure what its callers see.

    TTFT: from the request to the first message with a token. TPOT: (last token - first token) / (tokens - 1)
    of a turn. ITL: the gap between successive arrivals; tokens of one message are one arrival. E2EL: from the
    request to the last message. All of completed turns, in ms: mean, p50, p90, p99, maximum.

    Output tokens/s: those that came, cancelled turns' too, over the time from the first request to the end of
    the last turn. Goodput: turns/s that kept all objectives. Tokens not re-prefilled: the sum of
    usage.cached_tokens. Start delay: how much later than the arrival process asked a turn was sent, because
    its session's last turn still ran.

    A run is void, and the exit code 1, if any turn failed or was cut short. The sessions are deleted at the
    end, also after Ctrl-C.
    """
    with server_extra("bench"), explained(target):
        from apiary_bench import document
        from apiary_bench.serving import report
        from apiary_bench.serving.statistics import summarise
        from apiary_bench.serving.workload import Arrival, Objectives, Workload

        workload = Workload(
            sessions=sessions,
            turns=turns,
            history=history,
            input=input,
            output=output,
            policy=policy,
            arrival=None if arrival is None else Arrival(arrival),
            rate=rate,
            think=think,
            cancel_rate=cancel_rate,
            warmup=warmup,
            timeout=timeout,
            tenants=_tenants(tenant, tenants),
            objectives=Objectives(_seconds(slo_ttft), _seconds(slo_tpot)),
            seed=seed,
        )
        if json is not None:
            document.require(json)

        def connect(name: str | None) -> aio.Client:
            return made(aio.Client, target, name, tls, tls_root_file)

        try:
            run = asyncio.run(_run(workload, connect))
        except (KeyboardInterrupt, asyncio.CancelledError):
            console.note("stopped; nothing is reported")
            raise typer.Exit(130) from None
        summary = summarise(run.records, workload.objectives)
        console.write(f"{report.heading(workload, run)}\n")
        console.table(report.latencies(summary))
        console.table(report.totals(workload, summary))
        if json is not None:
            document.write(json, report.document(workload, run, summary))
        if run.undeleted:
            console.note(f"{len(run.undeleted)} sessions could not be deleted: {', '.join(run.undeleted)}")
        if summary.void:
            console.fail("the run is void: turns failed or were cut short, and the others had it easier")


async def _run(workload: Workload, connect: Connect) -> Run:
    from apiary_bench.serving import generator

    cancel_on_signals()
    with Bars() as bars:
        return await generator.run(workload, connect, bars)


def _tenants(name: str | None, count: int) -> tuple[str | None, ...]:
    if count == 1:
        return (name,)
    return tuple(f"{name or 'bench'}-{number}" for number in range(1, count + 1))


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000
