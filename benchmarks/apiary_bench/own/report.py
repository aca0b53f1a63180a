"""What such measurements report alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from rich.table import Table

from apiary_bench.document import provenance
from apiary_bench.own.turn import First
from apiary_client import Capacity, Model

_FOUND = ("cached tokens", "rebuild reason")


def origin(model: Model, capacity: Capacity, flags: Mapping[str, str], arguments: Any) -> dict[str, Any]:
    """The beginning of a document: what was measured, of whom. `arguments` is a dataclass."""
    return {
        **provenance("apiary", "torch", "grpcio", "safetensors"),
        "arguments": asdict(arguments),
        "environment": {"model": asdict(model), "capacity": asdict(capacity), "flags": dict(flags)},
    }


def first_tokens(kinds: Mapping[str, Sequence[First]]) -> Table:
    """A row for each kind of turn, by its label: its first token, and what it found."""
    table = times("first token, milliseconds", *_FOUND)
    for label, firsts in kinds.items():
        cached = sorted(first.cached_tokens for first in firsts)
        table.add_row(
            label,
            *milliseconds([first.seconds for first in firsts]),
            f"{cached[0]:,} to {cached[-1]:,}" if cached[-1] > cached[0] else f"{cached[0]:,}",
            ", ".join(sorted({first.rebuild_reason or "none" for first in firsts})),
        )
    return table


def times(of: str, *more: str) -> Table:
    """An empty table with columns for `milliseconds`, and more after those."""
    table = Table(of)
    for name in ("median", "least", "most", *more):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def milliseconds(seconds: Sequence[float]) -> list[str]:
    """The median, the least and the most."""
    return [f"{1000 * each:.1f}" for each in (median(seconds), min(seconds), max(seconds))]
