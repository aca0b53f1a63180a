"""`apiary bench engine`: the bare engine, without gRPC. It runs in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar

import typer
from rich.table import Table
from typer.core import TyperGroup

from apiary_client.cli import console
from apiary_client.cli.bench.measuring import measuring, workbench
from apiary_client.cli.bench.options import (
    Backend,
    CacheBudget,
    CacheDtype,
    JsonFile,
    Model,
    Policy,
    Repeats,
    Sessions,
    StepTokens,
    Threads,
    Weights,
    counts,
)
from apiary_client.cli.server_extra import server_extra

if TYPE_CHECKING:
    from apiary_bench.engine.workbench import Workbench
    from apiary_bench.progress import Observer

_Plan = TypeVar("_Plan")
_Result = TypeVar("_Result")

Conversations: TypeAlias = Annotated[
    int, typer.Option(min=1, metavar="N", help="Conversations, all at the same time.")
]
Input: TypeAlias = Annotated[int, typer.Option(min=1, metavar="TOKENS", help="Input of each turn.")]


class _Group(TyperGroup):
    """Without the name of an experiment, the options are those of `decode`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] not in ctx.help_option_names):
            args = ["decode", *args]
        return super().parse_args(ctx, args)


_app = typer.Typer(cls=_Group)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(_app, name="engine")


@_app.callback(
    epilog=console.examples(
        "apiary bench engine --sessions 1,4,16,64 --weights int8",
        "apiary bench engine turns --policy 'buzz2(kivi=4)'",
        "apiary bench engine prefill --prompt 8000,16000 --repeats 5",
        "apiary bench engine warm --sessions 200 --history 3000 --json warm.json",
    )
)
def engine() -> None:
    """Measure the bare engine, without gRPC. Without a command: decode.

    It is a worker's own engine, with its thread, scheduler and delivery, in this process. Inputs are random
    tokens; answers are greedy and exactly as long as asked for.
    """


@_app.command(
    epilog=console.examples(
        "apiary bench engine decode --sessions 1,16,64 --json decode.json",
        "apiary bench engine decode --sessions 16 --policy 'full(bound=1024)' --prompt 900",
    )
)
def decode(
    context: typer.Context,
    sessions: Sessions = "1,4,16",
    history: Annotated[
        int, typer.Option(min=0, metavar="TOKENS", help="Given to each session before; not measured.")
    ] = 0,
    prompt: Annotated[
        int, typer.Option(min=1, metavar="TOKENS", help="Input of the turn that measures prefill.")
    ] = 600,
    output: Annotated[
        int, typer.Option(min=2, metavar="TOKENS", help="Answer of the turn that measures decode.")
    ] = 64,
    repeats: Repeats = 3,
    json: JsonFile = None,
    model: Model = None,
    policy: Policy = None,
    weights: Weights = None,
    backend: Backend = None,
    cache_dtype: CacheDtype = None,
    step_tokens: StepTokens = None,
    cache_budget: CacheBudget = None,
    threads: Threads = None,
) -> None:
    """Tokens per second of sessions that prefill together, and then decode together.

    Prefill tokens/s: prompt tokens over the time from the first request to the last session's first token.

    A step here is one in which every session computes one generated token, and nothing else is computed; it
    lasts from the end of the step before to its own. Ms a step: the median and the 99th percentile. Decode
    tokens/s: sessions over the mean step.

    Output tokens/s: the answers' tokens over the time from the first request, of one token of input, to the
    last token. `apiary bench serve --turns 1 --input 1 --history PROMPT --output OUTPUT` measures the same
    through gRPC.

    Cache peak: the most of the budget that was ever used, workspaces included.
    """
    with server_extra("bench"):
        from apiary_bench.engine import report
        from apiary_bench.engine.decode import Decode, run

        plan = Decode(counts("--sessions", sessions), history, prompt, output, repeats)
        _measure(context, json, plan, run, report.decode)


@_app.command(
    epilog=console.examples(
        "apiary bench engine turns --json turns.json",
        "apiary bench engine turns --policy buzz --input 8 --output 300 --average 1",
    )
)
def turns(
    context: typer.Context,
    sessions: Conversations = 1,
    history: Annotated[
        int | None,
        typer.Option(min=1, metavar="TOKENS", help="Before the first turn; default twice the bound."),
    ] = None,
    input: Input = 8,
    output: Annotated[int, typer.Option(min=2, metavar="TOKENS", help="Answer of each turn.")] = 24,
    early: Annotated[int, typer.Option(min=1, metavar="N", help="The turn to compare with.")] = 3,
    late: Annotated[int, typer.Option(min=2, metavar="N", help="The turn that is compared.")] = 50,
    average: Annotated[
        int, typer.Option(min=1, metavar="N", help="Turns averaged from each on, at least.")
    ] = 4,
    repeats: Repeats = 3,
    json: JsonFile = None,
    model: Model = None,
    policy: Policy = None,
    weights: Weights = None,
    backend: Backend = None,
    cache_dtype: CacheDtype = None,
    step_tokens: StepTokens = None,
    cache_budget: CacheBudget = None,
    threads: Threads = None,
) -> None:
    """Time per output token at a late turn against an early one, both past the policy's bound.

    Of a turn it is (last token - first token) / (tokens - 1), the mean over sessions. It is averaged over the
    turns EARLY, EARLY + 1, ... and LATE, LATE + 1, ...: as many as make whole compaction periods, since the
    few steps that compact take longer. A period is what the cache's sizes need to repeat themselves, found
    by counting; how many turns and tokens that is for the policy is printed.

    Two conversations (or twice SESSIONS) are brought before these turns, which then alternate, so that
    whatever else the machine does slows both. The ratio is taken within a repeat.
    """
    with server_extra("bench"):
        from apiary_bench.engine import report
        from apiary_bench.engine.turns import Turns, run

        plan = Turns(sessions, history, input, output, early, late, average, repeats)
        _measure(context, json, plan, run, report.turns)


@_app.command(epilog=console.examples("apiary bench engine prefill --prompt 512,4000 --repeats 5"))
def prefill(
    context: typer.Context,
    prompt: Annotated[
        str, typer.Option(metavar="TOKENS,...", help="Lengths of prompts, each alone in a new session.")
    ] = "512,4000,8000,16000",
    repeats: Repeats = 3,
    json: JsonFile = None,
    model: Model = None,
    policy: Policy = None,
    weights: Weights = None,
    backend: Backend = None,
    cache_dtype: CacheDtype = None,
    step_tokens: StepTokens = None,
    cache_budget: CacheBudget = None,
    threads: Threads = None,
) -> None:
    """Seconds from a prompt to its first token, and prompt tokens per second.

    Where one prompt is twice as long as another, also their ratio, taken within a repeat.
    """
    with server_extra("bench"):
        from apiary_bench.engine import report
        from apiary_bench.engine.prefill import Prefill, run

        plan = Prefill(counts("--prompt", prompt), repeats)
        _measure(context, json, plan, run, report.prefill)


@_app.command(
    epilog=console.examples(
        "apiary bench engine warm --json warm.json",
        "apiary bench engine warm --policy 'buzz2(kivi=4,residual=64)' --cache-budget 512MiB",
    )
)
def warm(
    context: typer.Context,
    sessions: Annotated[int, typer.Option(min=3, metavar="N", help="Conversations that are held.")] = 200,
    history: Annotated[int, typer.Option(min=1, metavar="TOKENS", help="Of each.")] = 3000,
    input: Input = 32,
    pairs: Annotated[int, typer.Option(min=1, metavar="N", help="Next turns of both kinds.")] = 20,
    json: JsonFile = None,
    model: Model = None,
    policy: Policy = None,
    weights: Weights = None,
    backend: Backend = None,
    cache_dtype: CacheDtype = None,
    step_tokens: StepTokens = None,
    cache_budget: Annotated[
        str,
        typer.Option(
            metavar="SIZE", help="Memory for resident caches; others are parked.", rich_help_panel="Worker"
        ),
    ] = "1GiB",
    threads: Threads = None,
) -> None:
    """Memory of many conversations held by one worker, and how fast a parked one answers its next turn.

    Every session gets its history; what the cache budget does not hold is parked in host memory, without a
    limit. Then next turns of one token of output are sent, one at a time: of a parked session, drawn at
    random, and of a resident one, in pairs. To unpark a session, another one is parked; that is in its time.

    Reported are the bytes of the cache budget in use (slots and workspaces) and the parked ones, the resident
    set size of the process, the median of parked against resident first tokens within a pair, and the slowest
    parked one against the median resident one.
    """
    with server_extra("bench"):
        from apiary_bench.engine import report
        from apiary_bench.engine.warm import Warm, run

        plan = Warm(sessions, history, input, pairs)
        _measure(context, json, plan, run, report.warm)


def _measure(
    context: typer.Context,
    json: Path | None,
    plan: _Plan,
    run: Callable[[Workbench, _Plan, Observer], _Result],
    shown: Callable[[_Plan, _Result], tuple[str, Table]],
) -> None:
    from apiary_bench import document
    from apiary_bench.engine import report

    if json is not None:
        document.require(json)
    with measuring() as bars:
        bench = workbench(context)
        result = run(bench, plan, bars)
    asked, table = shown(plan, result)
    console.write(f"{asked}\n{report.subject(bench)}\n")
    console.table(table)
    if json is not None:
        document.write(json, report.document(bench, plan, result))
