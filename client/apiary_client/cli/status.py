"""`apiary status`: what a worker serves, what is in use, and what is wrong with its store."""

from __future__ import annotations

import typer
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from apiary_client.cli import console
from apiary_client.cli.options import DEFAULT_TARGET, Json, Target, Tenant, Tls, TlsRootFile, connect
from apiary_client.types import Capacity, Model


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=console.examples("apiary status", "apiary status --json | jq .capacity.store_error"))(
        status
    )


def status(
    json: Json = False,
    target: Target = DEFAULT_TARGET,
    tenant: Tenant = None,
    tls: Tls = False,
    tls_root_file: TlsRootFile = None,
) -> None:
    """Show a worker: its model, its memory, its sessions, and whether its store works."""
    with connect(target, tenant, tls, tls_root_file) as client:
        model, capacity = client.get_model(), client.get_capacity()
    if json:
        console.write(console.json_text({"model": model, "capacity": capacity}) + "\n")
    else:
        console.table(_table(model, capacity))


def _table(model: Model, now: Capacity) -> Table:
    return console.facts(
        ("model", f"{model.name}, by default {model.default_policy}"),
        (
            "turns",
            f"{now.running_turns} in flight, {now.queued_turns} of at most {now.queue_limit} waiting",
        ),
        ("sessions", f"{now.sessions}"),
        (
            "cache",
            f"{now.resident_sessions} of at most {now.max_resident_sessions} of {decimal(now.slot_bytes)} "
            f"(by the default policy), {_share(now.used_bytes, now.budget_bytes)}",
        ),
        ("parked", f"{now.parked_sessions}, {_share(now.parked_bytes, now.parked_budget_bytes)}"),
        ("stored", f"{now.stored_sessions}, {_share(now.stored_bytes, now.stored_budget_bytes)}"),
        ("store", _store(now)),
    )


def _share(used: int, budget: int) -> str:
    return f"{decimal(used)} of {decimal(budget)}"


def _store(now: Capacity) -> Text:
    """How the store is, in words."""
    if now.store_degraded:
        return Text(f"degraded: {now.store_error}", style="red")
    if now.unread_sessions:
        return Text(f"works, but {now.unread_sessions} sessions could not be read", style="red")
    return Text("works" if now.stored_budget_bytes else "none: sessions end with the worker")
