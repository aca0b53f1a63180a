"""How one session is shown."""

from __future__ import annotations

from datetime import datetime

from rich.filesize import decimal
from rich.table import Table

from apiary_client.cli import console
from apiary_client.types import Session


def show_session(session: Session, json: bool) -> None:
    """Print it, for people or as JSON."""
    if json:
        console.write(console.json_text(session) + "\n")
    else:
        console.table(details(session))


def details(session: Session) -> Table:
    """Return a session's facts as a table."""
    cache = session.cache
    return console.facts(
        ("session", session.name),
        ("state", session.state),
        ("policy", session.policy),
        ("turns", str(session.turn_count)),
        ("tokens", str(session.token_count)),
        ("cache", f"{cache.entries} of at most {cache.bound} entries, {decimal(cache.bytes)}"),
        ("created", when(session.create_time)),
        ("last turn", when(session.update_time)),
        ("expires", when(session.expire_time)),
        (
            "labels",
            ", ".join(f"{key}={value}" for key, value in sorted(session.labels.items())) or "none",
        ),
    )


def when(time: datetime | None) -> str:
    """A time as people read it."""
    return time.astimezone().strftime("%Y-%m-%d %H:%M") if time else "never"
