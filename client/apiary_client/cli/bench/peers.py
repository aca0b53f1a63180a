"""`apiary bench peers`: the same workloads on Apiary and on other engines."""

from __future__ import annotations

import asyncio
import signal
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apiary_client.cli import console
from apiary_client.cli.bench.bars import Bars
from apiary_client.cli.server_extra import server_extra

if TYPE_CHECKING:
    from collections.abc import Coroutine

_INSTALL = "Installation"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog=console.examples(
            "apiary bench peers --json peers.json --plots pictures",
            "apiary bench peers --peers apiary-fp32,vllm --workload turns --repeats 1",
            "apiary bench peers --workload growth-sessions,growth-history --json growth.json --resume",
            "apiary bench peers --json peers.json --resume --markdown >> docs/performance.md",
        )
    )(peers)


def peers(
    peers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,...",
            help="apiary-fp32, apiary-int8, both also with -bf16 or -int8 (cache), vllm, vllm-fp8 "
            "(cache), vllm-server (over HTTP), llama.cpp, llama.cpp-native (built here: half an hour), "
            "transformers; several, or a comma list. "
            "[dim]\\[default: apiary-fp32, apiary-int8, vllm, llama.cpp, transformers][/dim]",
            show_default=False,
        ),
    ] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,...",
            help="decode, turns, prefill, growth-sessions, growth-history; several, or a comma list. "
            "[dim]\\[default: decode, turns, prefill][/dim]",
            show_default=False,
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Medians are of so many runs.")] = 3,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every run there, each when it ends.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the runs that --json FILE has, but for void ones.")
    ] = False,
    plots: Annotated[Path | None, typer.Option(metavar="DIR", help="Draw pictures there.")] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table to be pasted into a page.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Sizes that show nothing but that everything works.")
    ] = False,
    limit: Annotated[
        float,
        typer.Option(
            min=1,
            metavar="SECONDS",
            help="A point that takes longer is void, and its engine is spared the larger ones.",
        ),
    ] = 900.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the tokens.")] = 0,
    model: Annotated[str, typer.Option(metavar="NAME|PATH", help="A pulled model or a directory.")] = (
        "smollm2-135m"
    ),
    policy: Annotated[
        str | None, typer.Option(metavar="SPEC", help="Cache policy of Apiary's sessions.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Measure this running worker, too, with its own settings, as apiary."
        ),
    ] = None,
    torch_index: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            envvar="TORCH_INDEX",
            help="The index to take torch from.",
            rich_help_panel=_INSTALL,
        ),
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Of the engines' virtual environments and logs. "
            "[dim]\\[default: apiary/peers in the user's cache][/dim]",
            show_default=False,
            rich_help_panel=_INSTALL,
        ),
    ] = None,
) -> None:
    """Put the same workloads on Apiary and on other engines, one engine at a time.

    Each is installed once, in its own virtual environment, and started anew for every workload, with all
    processors and one budget for the caches of all sessions. Apiary is measured over gRPC, vllm-server
    and llama.cpp over HTTP, vllm and transformers within their process, without text.

    decode: 16 sessions of 600 tokens; tokens/s while all decode. turns: 16 sessions of 3,000 tokens, then
    three turns of 32 in and 32 out; tokens/s from the first request to the last token. prefill: 512 and 4,000
    tokens, one prompt at a time; tokens/s until the first token. growth-sessions: 1 to 128 sessions of 600.
    growth-history: one session of 256 to 32,768.

    A row is void if any of its turns failed or was cut short.
    """
    if resume and json is None:
        console.fail("--resume goes on with a file: name it with --json", code=2)
    with server_extra("bench"):
        from apiary_bench import document, pictures
        from apiary_bench.peers import plots as drawing
        from apiary_bench.peers import registry, report
        from apiary_bench.peers import run as runs
        from apiary_bench.peers.apiary import Running
        from apiary_bench.peers.environment import root
        from apiary_bench.peers.results import Results
        from apiary_bench.peers.workload import workloads

        chosen = _listed(peers) or list(registry.DEFAULT)
        loads = workloads(_listed(workload) or ["decode", "turns", "prefill"], quick=quick)
        arguments: dict[str, Any] = {
            "peers": [*chosen, *([Running.name] if target else [])],
            "model": model,
            "policy": policy,
            "repeats": repeats,
            "quick": quick,
            "seed": seed,
        }
        if json is not None:
            document.require(json)
        if plots is not None:
            pictures.require(plots)
        there = resume and json is not None and json.exists()
        results = Results.read(json, arguments) if there and json is not None else Results(arguments)

        def keep(results: Results) -> None:
            if json is not None:
                document.write(json, results.content())

        try:
            with Bars() as bars:
                engines = registry.peers(
                    chosen,
                    model=model,
                    policy=policy,
                    root=directory or root(),
                    torch_index=torch_index,
                    observe=bars,
                )
                if target is not None:
                    engines.append(Running(target, policy))
                settings = runs.Settings(
                    repeats=repeats, seed=seed, vocab_size=registry.vocab_size(model), limit=limit
                )
                asyncio.run(_until_stopped(runs.run(engines, loads, settings, results, bars, keep)))
        except (KeyboardInterrupt, asyncio.CancelledError):
            kept = f"; finished runs are in {json}: the same command with --resume goes on" if json else ""
            console.note(f"stopped{kept}")
            raise typer.Exit(130) from None
        if markdown:
            console.write(f"{report.markdown(results, loads)}\n")
        else:
            console.table(report.table(results, loads))
        for line in report.notes(results):
            console.note(line)
        if plots is not None:
            pictures.save(plots, drawing.figures(results, loads))


async def _until_stopped(measuring: Coroutine[Any, Any, None]) -> None:
    """The end that others set, such as `timeout`, must not leave engines behind either. SIGINT is named since
    processes that shells start in the background inherit that it is ignored."""
    task = asyncio.ensure_future(measuring)
    with suppress(NotImplementedError):  # not on every platform
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    await task


def _listed(values: list[str] | None) -> list[str]:
    return [part.strip() for value in values or () for part in value.split(",")]
