"""`apiary sessions`: look at conversations; change, copy, rewind and delete them."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.filesize import decimal
from rich.table import Column, Table

from apiary_client.cli import cache_map, console, transfer
from apiary_client.cli.options import DEFAULT_TARGET, Json, Name, Target, Tenant, Tls, TlsRootFile, connect
from apiary_client.cli.session_table import show_session, when

app = typer.Typer(no_args_is_help=True, help="Look at sessions; change, copy, rewind and delete them.")
cache_map.register(app)
transfer.register(app)


@app.command(
    "list",
    epilog=console.examples("apiary sessions list", "apiary sessions list --json | jq -r '.\\[].name'"),
)
def list_(
    json: Json = False,
    target: Target = DEFAULT_TARGET,
    tenant: Tenant = None,
    tls: Tls = False,
    tls_root_file: TlsRootFile = None,
) -> None:
    """List the tenant's sessions."""
    with connect(target, tenant, tls, tls_root_file) as client:
        sessions = list(client.list_sessions(page_size=1000))
    if json:
        console.write(console.json_text(sessions) + "\n")
        return
    if not sessions:
        console.out.print("no sessions")
        return
    table = Table(Column("session", overflow="fold"), "state", Column("policy", overflow="fold"))
    for heading in ("turns", "tokens", "cache / bound", "bytes", "expires"):
        table.add_column(heading, justify="right", no_wrap=True)
    for session in sessions:
        table.add_row(
            session.id,
            session.state,
            session.policy,
            str(session.turn_count),
            str(session.token_count),
            f"{session.cache.entries} / {session.cache.bound}",
            decimal(session.cache.bytes),
            when(session.expire_time),
        )
    console.table(table)


@app.command(epilog=console.examples("apiary sessions show work", "apiary sessions show work --json"))
def show(
    name: Name,
    json: Json = False,
    target: Target = DEFAULT_TARGET,
    tenant: Tenant = None,
    tls: Tls = False,
    tls_root_file: TlsRootFile = None,
) -> None:
    """Show one session."""
    with connect(target, tenant, tls, tls_root_file) as client:
        session = client.get_session(name)
    show_session(session, json)


@app.command(
    epilog=console.examples(
        "apiary sessions update work --ttl 604800 --label team=bees",
        "apiary sessions update work --policy 'buzz2(kivi=4,pinned=40)'",
    )
)
def update(
    name: Name,
    policy: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="Another cache policy; the next turn computes the cache anew."),
    ] = None,
    ttl: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Let it end so long after its last turn; more than 0."),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Its labels, in place of those that it has; several times."),
    ] = None,
    json: Json = False,
    target: Target = DEFAULT_TARGET,
    tenant: Tenant = None,
    tls: Tls = False,
    tls_root_file: TlsRootFile = None,
) -> None:
    """Change a session's settings; what is not given stays."""
    labels = None if label is None else _labels(label)
    if policy is None and ttl is None and labels is None:
        raise typer.BadParameter("give --policy, --ttl or --label", param_hint="apiary sessions update")
    with connect(target, tenant, tls, tls_root_file) as client:
        session = client.update_session(name, policy=policy, ttl=ttl, labels=labels)
    show_session(session, json)


@app.command(epilog=console.examples("apiary sessions fork work", "apiary sessions fork work second-try"))
def fork(
    name: Name,
    new: Annotated[str, typer.Argument(metavar="NEW", help="The new session's id; drawn if left out.")] = "",
    json: Json = False,
    target: Target = DEFAULT_TARGET,
    tenant: Tenant = None,
    tls: Tls = False,
    tls_root_file: TlsRootFile = None,
) -> None:
    """Copy a session: both go on from here, each on its own."""
    with connect(target, tenant, tls, tls_root_file) as client:
        session = client.fork_session(name, new)
    show_session(session, json)


@app.command(
    epilog=console.examples("apiary sessions rewind work --back 1", "apiary sessions rewind work --keep 3")
)
def rewind(
    name: Name,
    keep: Annotated[
        int | None, typer.Option(metavar="TURNS", min=0, help="How many of its first turns to keep.")
    ] = None,
    back: Annotated[
        int | None, typer.Option(metavar="TURNS", min=1, help="How many of its last turns to take back.")
    ] = None,
    json: Json = False,
    target: Target = DEFAULT_TARGET,
    tenant: Tenant = None,
    tls: Tls = False,
    tls_root_file: TlsRootFile = None,
) -> None:
    """Take a session's last turns back.

    The next turn computes the cache anew, but for what a checkpoint has (apiary serve --checkpoints).
    """
    if (keep is None) == (back is None):
        raise typer.BadParameter("give one of --keep and --back", param_hint="apiary sessions rewind")
    with connect(target, tenant, tls, tls_root_file) as client:
        turns = client.get_session(name).turn_count
        if max(keep or 0, back or 0) > turns:
            option = "--keep" if back is None else "--back"
            console.fail(f"{name} has {turns} turns: {option} is at most that")
        session = client.rewind_session(name, turns - back if back is not None else keep or 0)
    show_session(session, json)


@app.command(epilog=console.examples("apiary sessions delete work"))
def delete(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Ids of sessions.")],
    target: Target = DEFAULT_TARGET,
    tenant: Tenant = None,
    tls: Tls = False,
    tls_root_file: TlsRootFile = None,
) -> None:
    """Delete sessions and free their memory; a turn in flight is cancelled."""
    with connect(target, tenant, tls, tls_root_file) as client:
        for name in names:
            client.delete_session(name)
            console.note(f"deleted {name}")


def _labels(pairs: list[str]) -> dict[str, str]:
    labels: dict[str, str] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not (key and separator):
            raise typer.BadParameter(f"{pair!r} is not KEY=VALUE", param_hint="--label")
        if key in labels:
            raise typer.BadParameter(f"{key!r} is given twice: a label has one value", param_hint="--label")
        labels[key] = value
    return labels
