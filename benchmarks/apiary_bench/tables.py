"""Tables that reports have alike."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text


def facts(*rows: tuple[str, str]) -> Table:
    """A table of labels and values."""
    table = Table.grid(padding=(0, 2))
    for label, value in rows:
        table.add_row(Text(label, style="dim"), value)
    return table
