"""The map of a cache as a picture: layers (or heads) downwards, the transcript from left to right."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.text import Text

from apiary_client.cache_map import CacheMap, EntryKind, LayerMap


@dataclass(frozen=True, slots=True)
class _Look:
    letter: str
    style: str  # in a terminal
    colour: str  # in a file


_LOOKS = {
    EntryKind.SINK: _Look("s", "red", "#d62728"),
    EntryKind.SAMPLED: _Look("a", "magenta", "#9467bd"),
    EntryKind.CELL: _Look("c", "yellow", "#e08214"),
    EntryKind.HEAVY: _Look("h", "bright_red", "#8c2d04"),
    EntryKind.MIDDLE: _Look("m", "cyan", "#17a2b8"),
    EntryKind.WINDOW: _Look("w", "bright_blue", "#1f5fb4"),
    EntryKind.PINNED: _Look("p", "green", "#2ca02c"),
    EntryKind.UNKNOWN: _Look("?", "white", "#7f7f7f"),
}
_SHADES = ((0.0, " "), (0.05, "·"), (0.2, "░"), (0.5, "▒"), (0.8, "▓"), (1.0, "█"))  # up to which share
_TALLEST = 40.0  # inches


@dataclass(frozen=True, slots=True)
class _Row:
    """What a layer or head keeps of each column: the share of its tokens, over the heads."""

    label: str
    shares: Sequence[float]


def terminal(drawn: CacheMap) -> Iterator[Text]:
    """The picture for a terminal, line by line, and what its signs mean; also without colours."""
    rows = _rows(drawn)
    margin = max(len(row.label) for row in rows)
    looks = [None if column.kind is None else _LOOKS[column.kind] for column in drawn.columns]
    last = str(drawn.token_count - 1)
    ruler = "0" + last.rjust(len(looks) - 1) if len(looks) > len(last) else ""
    yield Text(f"{'':{margin}}  {ruler}".rstrip(), style="dim")
    for row in rows:
        line = Text(f"{row.label:>{margin}}  ", style="dim")
        for share, look in zip(row.shares, looks, strict=True):
            line.append(_shade(share), style="not dim" if look is None else f"not dim {look.style}")
        yield line
    line = Text(f"{'':{margin}}  ", style="dim")
    for look in looks:
        line.append(*(" ", "dim") if look is None else (look.letter, f"not dim {look.style}"))
    yield line
    yield _legend(drawn, margin)
    steps = "  ".join(f"{sign} to {share:.0%}" for share, sign in _SHADES[1:])
    yield Text(f"{'':{margin}}  of a column's tokens kept: {steps}", style="dim")


def save(drawn: CacheMap, path: Path) -> None:
    """Write the picture as a PNG.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = _rows(drawn)
    colours = [to_rgb("white" if c.kind is None else _LOOKS[c.kind].colour) for c in drawn.columns]
    picture = [
        [
            tuple(1 - (1 - part) * share**0.5 for part in colour)  # the root lets few tokens be seen, too
            for share, colour in zip(row.shares, colours, strict=True)
        ]
        for row in rows
    ]
    figure = Figure(figsize=(10, min(_TALLEST, 1.8 + 0.13 * len(rows))), layout="constrained")
    axes = figure.subplots()
    axes.imshow(picture, aspect="auto", interpolation="nearest", extent=(0, drawn.token_count, len(rows), 0))
    ticks = range(0, len(rows), -(-len(rows) // 40))
    axes.set_yticks([place + 0.5 for place in ticks], [rows[place].label for place in ticks])
    axes.tick_params(axis="y", labelsize=6, length=0)
    axes.set_xlabel("token of the transcript")
    axes.set_ylabel("layer.head" if drawn.layers[0].heads else "layer")
    axes.set_title(f"{drawn.name}: {drawn.entries} of {drawn.token_count} tokens in each head", fontsize=10)
    counts = _counts(drawn)
    figure.legend(
        [Patch(color=_LOOKS[kind].colour) for kind in counts],
        [f"{kind} {count}" for kind, count in counts.items()],
        loc="outside lower center",
        ncols=len(counts),
        frameon=False,
        fontsize=8,
    )
    figure.savefig(path, format="png", dpi=120)


def printable(text: str) -> str:
    """The text as it can be shown on one line: what a terminal would obey, or not show, is escaped."""
    return "".join(
        sign if sign.isprintable() and sign != "\\" else sign.encode("unicode_escape").decode()
        for sign in text
    )


def _legend(drawn: CacheMap, margin: int) -> Text:
    line = Text(f"{'':{margin}}  ", style="dim")
    for kind, count in _counts(drawn).items():
        look = _LOOKS[kind]
        line.append(look.letter, style=f"not dim {look.style}")
        line.append(f" {kind} {count}  ")
    line.append("(entries of each head)")
    return line


def _counts(drawn: CacheMap) -> dict[EntryKind, int]:
    """Entries of each kind in a head; pins apart all heads and layers have equally many."""
    return {count.kind: count.entries // drawn.kv_heads for count in drawn.layers[0].kinds}


def _shade(share: float) -> str:
    return next((sign for most, sign in _SHADES if share <= most), "█")


def _rows(drawn: CacheMap) -> list[_Row]:
    widths = [column.stop - column.start for column in drawn.columns]
    rows: list[_Row] = []
    for layer in drawn.layers:
        if layer.heads:
            rows += _heads(drawn, layer, widths)
        else:
            kept = zip(layer.column_entries, widths, strict=True)
            rows.append(_Row(str(layer.layer), [n / (width * drawn.kv_heads) for n, width in kept]))
    return rows


def _heads(drawn: CacheMap, layer: LayerMap, widths: Sequence[int]) -> Iterator[_Row]:
    starts = [column.start for column in drawn.columns]
    for number, head in enumerate(layer.heads):
        kept = Counter(bisect_right(starts, position) - 1 for position in head.positions)
        yield _Row(f"{layer.layer}.{number}", [kept[place] / width for place, width in enumerate(widths)])
