"""`apiary generate`: one answer."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from apiary_client.cli import console
from apiary_client.cli.options import (
    DEFAULT_TARGET,
    Json,
    MaxTokens,
    MinP,
    Policy,
    RepetitionPenalty,
    Seed,
    System,
    Target,
    Temperature,
    Tenant,
    Tls,
    TlsRootFile,
    TopK,
    TopP,
    connect,
)
from apiary_client.types import Message, Sampling, Stopping, TurnOptions


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog=console.examples(
            "apiary generate 'Name three bees.'",
            "apiary generate --raw 'Once upon a time' --max-tokens 40",
            "cat question.txt | apiary generate - --json",
        )
    )(generate)


def generate(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What to say; - reads it from stdin.")],
    raw: Annotated[bool, typer.Option("--raw", help="Continue the plain text; no chat template.")] = False,
    session: Annotated[
        str | None, typer.Option(metavar="NAME", help="Make it a turn of this session.")
    ] = None,
    system: System = None,
    policy: Policy = None,
    max_tokens: MaxTokens = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="STRING", help="End before this string; may be repeated.")
    ] = None,
    timeout: Annotated[float | None, typer.Option(min=0, metavar="SECONDS", help="Give up after.")] = None,
    priority: Annotated[
        int,
        typer.Option(
            min=-100, max=100, metavar="N", help="Higher goes first among the requests of one tenant."
        ),
    ] = 0,
    json: Json = False,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    target: Target = DEFAULT_TARGET,
    tenant: Tenant = None,
    tls: Tls = False,
    tls_root_file: TlsRootFile = None,
) -> None:
    """Print one answer as it is generated; greedy unless a temperature is set."""
    if raw and system is not None:
        console.fail("--system needs the chat template: leave out --raw", code=2)
    options = TurnOptions(
        session=session,
        policy=policy,
        priority=priority,
        sampling=Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        ),
        stopping=Stopping(max_tokens=max_tokens, stop=stop or ()),
    )
    with connect(target, tenant, tls, tls_root_file) as client:
        if text == "-":
            text = sys.stdin.read()
        messages = None
        if raw:
            options["text"] = text
        else:
            opening = [Message("system", system)] if system is not None else []
            messages = [*opening, Message("user", text)]
        if json:
            whole = client.generate(messages, timeout=timeout, **options)
            console.write(console.json_text(whole) + "\n")
        else:
            console.answer(client.stream(messages, timeout=timeout, **options))
