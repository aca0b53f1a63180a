"""Options that several commands share, and the connection that they describe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeAlias, TypeVar

import typer

from apiary_client import TLS, Client, channel
from apiary_client.cli import console
from apiary_client.errors import ApiaryError

DEFAULT_TARGET = channel.DEFAULT_TARGET

_Client = TypeVar("_Client")

_WHERE = "Connection"
_HOW = "Sampling"

Target: TypeAlias = Annotated[
    str,
    typer.Option(
        envvar="APIARY_TARGET", metavar="HOST:PORT", help="The worker or router.", rich_help_panel=_WHERE
    ),
]
Tenant: TypeAlias = Annotated[
    str | None,
    typer.Option(
        envvar="APIARY_TENANT",
        help="On whose behalf; default the worker's.",
        rich_help_panel=_WHERE,
    ),
]
Tls: TypeAlias = Annotated[
    bool, typer.Option("--tls", help="Encrypt; trust the system's roots.", rich_help_panel=_WHERE)
]
TlsRootFile: TypeAlias = Annotated[
    Path | None,
    typer.Option(metavar="PEM", help="Encrypt; trust these roots instead.", rich_help_panel=_WHERE),
]
Name: TypeAlias = Annotated[
    str, typer.Argument(metavar="NAME", help="The session's id, with or without `sessions/`.")
]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]

Policy: TypeAlias = Annotated[
    str | None,
    typer.Option(metavar="SPEC", help="Cache policy, e.g. 'buzz(window=300)' or 'buzz2(pinned=system)'."),
]
System: TypeAlias = Annotated[str | None, typer.Option(help="System message before the first turn.")]
MaxTokens: TypeAlias = Annotated[int | None, typer.Option(min=1, help="Most tokens in an answer.")]
Temperature: TypeAlias = Annotated[
    float | None, typer.Option(min=0, max=10, help="0 is greedy.", rich_help_panel=_HOW)
]
TopK: TypeAlias = Annotated[
    int | None,
    typer.Option(min=0, max=2**31 - 1, help="Keep the k likeliest; 0 keeps all.", rich_help_panel=_HOW),
]
TopP: TypeAlias = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Keep the likeliest tokens that sum to p.", rich_help_panel=_HOW),
]
MinP: TypeAlias = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Drop tokens below this share of the likeliest.", rich_help_panel=_HOW),
]
RepetitionPenalty: TypeAlias = Annotated[
    float | None,
    typer.Option(min=0, max=10, help="Divides the logits of seen tokens.", rich_help_panel=_HOW),
]
Seed: TypeAlias = Annotated[
    int | None,
    typer.Option(min=0, max=2**64 - 1, help="Same seed, same text.", rich_help_panel=_HOW),
]


@contextmanager
def connect(target: str, tenant: str | None, tls: bool, tls_root_file: Path | None) -> Iterator[Client]:
    """Yield a client; what goes wrong while it is used ends the command with one line on stderr."""
    with made(Client, target, tenant, tls, tls_root_file) as client, explained(target):
        yield client


def made(
    kind: Callable[..., _Client], target: str, tenant: str | None, tls: bool, tls_root_file: Path | None
) -> _Client:
    """Return a client of a kind, sync or asyncio; end the command with one line on stderr where the options
    make none."""
    try:
        return kind(
            target, tenant=tenant, tls=TLS(tls_root_file) if tls or tls_root_file is not None else None
        )
    except (ValueError, OSError) as error:
        console.fail(str(error))


@contextmanager
def explained(target: str) -> Iterator[None]:
    """End the command with one line on stderr when a call fails."""
    try:
        yield
    except ApiaryError as error:
        console.fail(console.explain(error, target))
    except UnicodeError:
        console.fail("the text is not valid UTF-8")
    except (ValueError, OverflowError) as error:
        console.fail(f"a number that no request can carry: {error}")
