"""`apiary chat`: a conversation with a session, by a person at a terminal or by lines on stdin."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from apiary_client.cli import console, terminal
from apiary_client.cli.conversation import Conversation
from apiary_client.cli.options import (
    DEFAULT_TARGET,
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
from apiary_client.client import Client
from apiary_client.errors import ApiaryError, SessionNotFound
from apiary_client.types import Sampling, Session, Stopping

_CLEANUP_SECONDS = 5.0


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog=console.examples(
            "apiary chat",
            "apiary chat --session work --system 'Answer in one sentence.'",
            "printf 'My name is Ada.\\nWhat is my name?\\n' | apiary chat",
        )
    )(chat)


def chat(
    session: Annotated[
        str | None, typer.Option(metavar="NAME", help="Resume this session, or create it; it is kept.")
    ] = None,
    system: System = None,
    policy: Policy = None,
    max_tokens: MaxTokens = None,
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
    """Chat. Without --session the conversation is forgotten at the end.

    At a terminal, sampling defaults to temperature 0.2 and top-p 0.9. When stdin is no terminal, each of its
    lines is a turn, decoding is greedy, and stdout gets the answers and nothing else.
    """
    person = sys.stdin.isatty()
    if person and temperature is None:
        temperature, top_p = 0.2, 0.9 if top_p is None else top_p
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    with connect(target, tenant, tls, tls_root_file) as client, _opened(client, session, policy) as opened:
        if system is not None and opened.turn_count:
            console.fail(f"{opened.name} has turns already: a system message may only open a session")
        conversation = Conversation(client, opened, sampling, Stopping(max_tokens=max_tokens), system)
        if person:
            terminal.run(conversation, target)
        else:
            _pipe(conversation)


@contextmanager
def _opened(client: Client, name: str | None, policy: str | None) -> Iterator[Session]:
    """Yield the named session, or a fresh one that is deleted at the end."""
    if name is not None:
        yield _resume(client, name, policy)
        return
    session = client.create_session(policy=policy)
    try:
        yield session
    finally:
        try:
            client.delete_session(session, timeout=_CLEANUP_SECONDS)
        except SessionNotFound:
            pass  # it expired, or somebody else deleted it
        except ApiaryError as error:
            console.note(f"{session.name} could not be deleted ({error.message}); it will expire")


def _resume(client: Client, name: str, policy: str | None) -> Session:
    try:
        session = client.get_session(name)
    except SessionNotFound:
        return client.create_session(name.removeprefix("sessions/"), policy=policy)
    if policy is not None and not _names(policy, session.policy):
        console.fail(f"{session.name} was created with the policy {session.policy}: leave out --policy")
    return session


def _names(spec: str, policy: str) -> bool:
    """Whether a policy as a person writes it says nothing else than the server's full form of it, in which
    the system prompt that it pins has become a number of tokens, or none."""
    asked, has = (re.findall(r"[\w=]+", text.replace(" ", "")) for text in (spec, policy))
    return asked[:1] == has[:1] and set(asked) - {"pinned=system"} <= set(has)


def _pipe(conversation: Conversation) -> None:
    for line in sys.stdin:
        if text := line.strip():
            console.answer(conversation.ask(text))
