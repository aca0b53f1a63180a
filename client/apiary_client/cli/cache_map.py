"""`apiary sessions map`: which tokens of its transcript a session's cache keeps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from apiary_client.cache_map import CacheMap, EntryKind, LayerMap
from apiary_client.cli import console, map_drawing
from apiary_client.cli.options import DEFAULT_TARGET, Json, Target, Tenant, Tls, TlsRootFile, connect

_MARGIN = 8  # of the picture's lines: a layer's or head's number
_FINEST = 512  # columns


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "map",
        epilog=console.examples(
            "apiary sessions map work",
            "apiary sessions map work --layer 0 --layer 29 --full | less",
            "apiary sessions map work --png work.png",
        ),
    )(map_)


def map_(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="The session's id, with or without `sessions/`.")
    ],
    layer: Annotated[
        list[int] | None, typer.Option(min=0, metavar="N", help="Of this layer, from 0; several times.")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Each head by itself, with all tokens that it keeps.")
    ] = False,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, max=1000, metavar="N", help="How many tokens to show."),
    ] = None,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the picture there, too.")] = None,
    json: Json = False,
    target: Target = DEFAULT_TARGET,
    tenant: Tenant = None,
    tls: Tls = False,
    tls_root_file: TlsRootFile = None,
) -> None:
    """Draw which tokens of a session each layer keeps, and why; and show those that most heads keep."""
    if full and tokens is not None:
        raise typer.BadParameter("--full shows all tokens: leave it out", param_hint="--tokens")
    if png is not None and find_spec("matplotlib") is None:
        console.fail("--png needs matplotlib: pip install matplotlib")
    limit = 0 if full else tokens or 20
    columns = max(1, min(console.out.width - _MARGIN, _FINEST))
    with connect(target, tenant, tls, tls_root_file) as client:

        def ask(columns: int) -> CacheMap:
            return client.get_cache_map(
                name, full=full, layers=layer or (), column_count=columns, token_limit=limit
            )

        drawn = ask(columns)
        fine = drawn if png is None else ask(_FINEST)
    if json:
        console.write(console.json_text(drawn) + "\n")
    else:
        _show(drawn, full)
    if png is not None:
        _save(fine, png)


def _show(drawn: CacheMap, full: bool) -> None:
    console.out.print(Text(f"{drawn.name}, {drawn.state}: {drawn.policy}"), soft_wrap=True)
    if not drawn.entries:
        console.out.print("it has no cache now")
        return
    heads = drawn.kv_heads * len(drawn.layers)
    every, some = f"{drawn.entries} of {drawn.token_count} tokens", f"{drawn.kept_token_count} in some"
    console.out.print(Text(f"{every} in each of {heads} heads, {some}"), soft_wrap=True)
    for line in map_drawing.terminal(drawn):
        console.out.print(line)
    if full:
        for layer in drawn.layers:
            console.write("".join(f"{line}\n" for line in _entries(drawn, layer)))
    else:
        console.out.print()
        console.table(_most_kept(drawn, heads))


def _most_kept(drawn: CacheMap, heads: int) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("position", f"of {heads} heads", "score"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("kind")
    table.add_column("text", overflow="fold")
    for token in drawn.tokens:
        table.add_row(
            str(token.position),
            str(token.head_count),
            "" if token.mean_score is None else f"{token.mean_score:.2f}",
            _kinds(token.kinds),
            _quoted(token.text),
        )
    return table


def _entries(drawn: CacheMap, layer: LayerMap) -> Iterator[str]:
    """All that a layer keeps: a line for each token, and what its score is in each head."""
    texts = {token.position: token.text for token in drawn.tokens}
    cells: dict[int, dict[int, str]] = {}
    kinds: dict[int, dict[EntryKind, None]] = {}
    for number, head in enumerate(layer.heads):
        scores = [f"{score:.2f}" for score in head.scores] or ["kept"] * len(head.positions)
        for position, score, kind in zip(head.positions, scores, head.kinds, strict=True):
            cells.setdefault(position, {})[number] = score
            kinds.setdefault(position, {})[kind] = None
    headings = "".join(f"{f'{layer.layer}.{number}':>10}" for number in range(len(layer.heads)))
    yield ""
    yield f"position  kind    {headings}  text"
    for position in sorted(cells):
        line = "".join(f"{cells[position].get(number, '-'):>10}" for number in range(len(layer.heads)))
        yield f"{position:>8}  {_kinds(kinds[position]):<8}{line}  {_quoted(texts[position])}"


def _kinds(kinds: Iterable[EntryKind]) -> str:
    return ",".join(kinds)


def _quoted(text: str) -> str:
    return f'"{map_drawing.printable(text)}"'


def _save(drawn: CacheMap, path: Path) -> None:
    if not drawn.entries:
        console.fail(f"{drawn.name} has no cache now: there is nothing to draw")
    try:
        map_drawing.save(drawn, path)
    except OSError as error:
        console.fail(f"{path} cannot be written: {error.strerror or error}")
    console.note(f"wrote {path}")
