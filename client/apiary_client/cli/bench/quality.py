"""`apiary bench quality` and `apiary bench report`. They run on the worker's own code, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from apiary_client.cli import console
from apiary_client.cli.bench.bars import Bars
from apiary_client.cli.bench.options import CacheDtype, Weights, numbers
from apiary_client.cli.server_extra import server_extra


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(
        epilog=console.examples(
            "apiary bench quality --data DIR --json quality.json --plots pictures",
            "apiary bench quality --data DIR --task wikitext,qa10 --policies 'h2o,buzz(window=300)' "
            "--limit 5",
            "apiary bench quality --data DIR --task wikitext --entries 282,564,1128 --plots pictures",
        )
    )(quality)
    app.command(
        epilog=console.examples(
            "apiary bench report quality.json",
            "apiary bench report questions.json summaries.json --markdown >> docs/quality.md",
        )
    )(report)


def quality(
    data: Annotated[Path, typer.Option(metavar="DIR", help="The evaluation files.")],
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="wikitext, xsum, cnn_dm, qa10, fidelity, recall; several, or a comma list."
        ),
    ] = None,
    policies: Annotated[
        list[str] | None,
        typer.Option(metavar="SPECS", help="Policies; several, or a comma list. Default: all."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Documents of each task; default the task's own.")
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write results there; FILE.partial lets a run go on."),
    ] = None,
    plots: Annotated[Path | None, typer.Option(metavar="DIR", help="Draw pictures there.")] = None,
    model: Annotated[str, typer.Option(metavar="NAME|PATH", help="A pulled model or a directory.")] = (
        "smollm2-135m"
    ),
    weights: Weights = None,
    cache_dtype: CacheDtype = None,
    entries: Annotated[
        str, typer.Option(metavar="N,...", help="Average entries that policies are matched to.")
    ] = "564",
    ratio: Annotated[
        str, typer.Option(metavar="X,...", help="For summaries: times less than the prompt's tokens.")
    ] = "2.5",
    match: Annotated[
        str, typer.Option(metavar="bytes|entries", help="What policies have equally much of, on average.")
    ] = "bytes",
    unmatched: Annotated[
        bool, typer.Option("--unmatched", help="Run policies as written, not scaled.")
    ] = False,
    baseline: Annotated[
        str, typer.Option(metavar="SPEC", help="The policy that all are compared with.")
    ] = "full",
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap and the recall task.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 2,
) -> None:
    """Measure what cache policies cost in quality, at equal average bytes, with 95% intervals.

    Each policy's sizes are scaled in proportion until the memory that it holds at rest, averaged over the
    scored tokens, matches that of so many plain entries within 2%. The full cache always runs: it is the
    reference.
    """
    with server_extra("bench"):
        from apiary_bench import document, pictures
        from apiary_bench.quality import plots as figures
        from apiary_bench.quality import record, tables
        from apiary_bench.quality.journal import Journal
        from apiary_bench.quality.report import sections
        from apiary_bench.quality.run import prepare, run
        from apiary_bench.quality.sample import Sample
        from apiary_bench.quality.settings import Settings

        settings = Settings(
            data=data,
            tasks=tuple(_listed(task)),
            policies=tuple(_specs(policies)),
            limit=limit,
            model=model,
            weights=weights or "fp32",
            cache_dtype=cache_dtype or "float32",
            entries=tuple(numbers("--entries", entries, int)),
            ratios=tuple(numbers("--ratio", ratio, float)),
            match=None if unmatched else _match(match),
            baseline=baseline,
            seed=seed,
            threads=threads,
        )
        if plots is not None:
            pictures.require(plots)
        ready, stages = prepare(settings)
        partial = None if json is None else json.with_name(f"{json.name}.partial")
        try:
            with Journal(partial) as journal, Bars() as bars:
                results = run(ready, stages, journal, bars)
        except KeyboardInterrupt:
            if partial is not None:
                console.note(f"stopped; finished documents are in {partial}: the same command goes on")
            raise typer.Exit(130) from None
        found = sections(Sample.of(settings, ready, each) for each in results)
        for section in found:
            console.table(tables.table(section))
        if json is not None:
            document.write(json, record.document(settings, found))
        if plots is not None:
            figures.draw(plots, ready, results, found)


def report(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="What `apiary bench quality --json` wrote.")
    ],
    policies: Annotated[
        list[str] | None,
        typer.Option(metavar="SPECS", help="Only these, as they were written then. Default: all."),
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Tables to paste into a page, without the peaks.")
    ] = False,
) -> None:
    """Print the tables of finished quality runs again; nothing is measured.

    Several runs are joined: policies of the same task, budget and documents stand in one table, and are
    compared with each other. Runs with fp32 and with int8 weights can be joined, too.
    """
    with server_extra("bench"):
        from apiary_bench.quality import record, tables
        from apiary_bench.quality.report import sections
        from apiary_bench.quality.sample import join

        samples = join(sample for file in files for sample in record.read(file))
        if asked := _specs(policies):
            samples = [sample.only(asked) for sample in samples]
        found = sections(samples)
        for section in found:
            if markdown:
                console.write(f"{tables.markdown(section)}\n\n")
            else:
                console.table(tables.table(section))


def _match(text: str) -> Literal["bytes", "entries"]:
    if text == "bytes":
        return "bytes"
    if text == "entries":
        return "entries"
    console.fail(f"--match takes bytes or entries, not {text!r}", code=2)


def _specs(values: Sequence[str] | None) -> list[str]:
    from apiary_bench.quality.bench import split_specs

    return [spec for value in values or () for spec in split_specs(value)]


def _listed(values: Sequence[str] | None) -> list[str]:
    return [part.strip() for value in values or () for part in value.split(",")]
