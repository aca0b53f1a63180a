"""`apiary sessions export | import`: sessions as files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, BinaryIO

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from apiary_client.cli import console
from apiary_client.cli.options import DEFAULT_TARGET, Json, Target, Tenant, Tls, TlsRootFile, connect
from apiary_client.cli.session_table import show_session

_CHUNK = 2**20  # bytes


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(
        "export",
        epilog=console.examples(
            "apiary sessions export work work.apiary",
            "apiary sessions import work.apiary --target other:50051",
        ),
    )(export)
    app.command(
        "import",
        epilog=console.examples(
            "apiary sessions import work.apiary", "apiary sessions import work.apiary --as new"
        ),
    )(import_)


def export(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="The session's id, with or without `sessions/`.")
    ],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it.", dir_okay=False)],
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")] = False,
    target: Target = DEFAULT_TARGET,
    tenant: Tenant = None,
    tls: Tls = False,
    tls_root_file: TlsRootFile = None,
) -> None:
    """Write a session to a file: settings, transcript and cache. The session stays.

    The file has the whole conversation: keep it as you would keep that.
    """
    if file.exists() and not force:
        console.fail(f"{file} exists: choose another name, or --force", code=2)
    unfinished = file.with_name(f"{file.name}.unfinished")
    try:
        with (
            connect(target, tenant, tls, tls_root_file) as client,
            open(unfinished, "wb", opener=_private) as out,
            _progress("exporting") as (progress, task),
        ):
            for chunk in client.export_session(name):
                progress.update(task, total=chunk.total_bytes or None, advance=len(chunk.data))
                out.write(chunk.data)
            out.flush()
            os.fsync(out.fileno())
            size = out.tell()
        unfinished.replace(file)
    except OSError as error:
        console.fail(f"{file} cannot be written: {error.strerror or error}")
    finally:
        unfinished.unlink(missing_ok=True)
    console.note(f"exported {name} to {file} ({size:,} bytes)")


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `apiary sessions export` wrote.")],
    as_: Annotated[
        str, typer.Option("--as", metavar="NEW", help="The session's id; drawn if left out.")
    ] = "",
    json: Json = False,
    target: Target = DEFAULT_TARGET,
    tenant: Tenant = None,
    tls: Tls = False,
    tls_root_file: TlsRootFile = None,
) -> None:
    """Add a session from a file, to this or another worker of the same model."""
    try:
        with (
            file.open("rb") as data,
            connect(target, tenant, tls, tls_root_file) as client,
            _progress("importing") as (progress, task),
        ):
            progress.update(task, total=os.fstat(data.fileno()).st_size)
            session = client.import_session(_chunks(data, progress, task), as_)
    except OSError as error:
        console.fail(f"{file} cannot be read: {error.strerror or error}")
    show_session(session, json)


def _chunks(data: BinaryIO, progress: Progress, task: TaskID) -> Iterator[bytes]:
    while chunk := data.read(_CHUNK):
        progress.update(task, advance=len(chunk))
        yield chunk


@contextmanager
def _progress(what: str) -> Iterator[tuple[Progress, TaskID]]:
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console.err,
        transient=True,
        disable=not console.err.is_terminal,
    ) as progress:
        yield progress, progress.add_task(what, total=None)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
