"""`apiary bench roofline`: how far the engine's steps are from what the machine allows, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from apiary_client.cli import console
from apiary_client.cli.bench.measuring import measuring, workbench
from apiary_client.cli.bench.options import (
    Backend,
    CacheBudget,
    CacheDtype,
    JsonFile,
    Model,
    Policy,
    Sessions,
    StepTokens,
    Threads,
    Weights,
    counts,
)
from apiary_client.cli.server_extra import server_extra


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog=console.examples(
            "apiary bench roofline --json roofline.json --plots pictures",
            "apiary bench roofline --sessions 1,16,64 --weights int8",
            "apiary bench roofline --sessions 16 --policy 'full(bound=4096)' --history 3000",
        )
    )(roofline)


def roofline(
    context: typer.Context,
    sessions: Sessions = "1,16,64",
    history: Annotated[
        int, typer.Option(min=1, metavar="TOKENS", help="Of each session before it decodes.")
    ] = 600,
    steps: Annotated[
        int, typer.Option(min=1, metavar="N", help="Measured of each, at least: whole compaction periods.")
    ] = 64,
    json: JsonFile = None,
    plots: Annotated[Path | None, typer.Option(metavar="DIR", help="Draw a picture there.")] = None,
    model: Model = None,
    policy: Policy = None,
    weights: Weights = None,
    backend: Backend = None,
    cache_dtype: CacheDtype = None,
    step_tokens: StepTokens = None,
    cache_budget: CacheBudget = None,
    threads: Threads = None,
) -> None:
    """The time of decoding steps as a multiple of their floor, and where it goes.

    Floor: the sum over a step's operations of max(bytes / copy bandwidth, arithmetic / peak of matrix
    products). Both ceilings are measured before and after the steps, with the engine's threads, and the best
    counts: copies between tensors of 256 MiB, bytes read and written (as in STREAM), and square products of
    1024 to 3072 in float32, with int8 weights also in int8.

    Operations: each linear layer (weights as they are stored, rows in and out), each layer's attention (keys
    and values read, new ones written), the policy's states (read and written), the embedding, and sampling
    (logits read). Norms, rotations and activations have no floor: they can be part of their
    neighbours.

    A step is one round of the engine's loop in which every session decodes one token. Its parts add up to its
    time: linear, attention, scores (recording states, where the
    attention does not do it itself), sampling, embedding, dispatch (the rest of the forward
    pass: small operations, packing, Python), compaction (beginning and ending segments), delivery
    (detokenising, the hand-off to the readers), other (commands, scheduling, books).
    """
    with server_extra("bench"):
        from apiary_bench import document, pictures
        from apiary_bench.engine.report import subject
        from apiary_bench.roofline import plots as figures
        from apiary_bench.roofline import report
        from apiary_bench.roofline.run import Plan, run

        plan = Plan(counts("--sessions", sessions), history, steps)
        if json is not None:
            document.require(json)
        if plots is not None:
            pictures.require(plots)
        with measuring() as bars:
            bench = workbench(context)
            result = run(bench, plan, bars)
        console.write(f"{report.heading(bench, plan, result)}\n")
        console.table(report.steps(result))
        console.table(report.parts(result))
        if json is not None:
            document.write(json, report.document(bench, plan, result))
        if plots is not None:
            pictures.save(plots, {"roofline.png": figures.steps(result, subject(bench))})
