"""What a run found as tables, for a terminal and for a page."""

from __future__ import annotations

from rich.table import Table

from apiary_bench.quality.report import Row, Section
from apiary_bench.quality.sizing import TOLERANCE
from apiary_bench.quality.statistics import Estimate
from apiary_bench.quality.tasks.task import Metric


def table(section: Section) -> Table:
    """A task for people. Comparisons are of the first metric."""
    shown = Table(title=section.sample.title, title_justify="left")
    cells = _columns(section, compact=False)
    for name in cells:
        first = name == "policy"
        shown.add_column(name, overflow="fold" if first else "ellipsis", justify="left" if first else "right")
    for line in zip(*cells.values(), strict=True):
        shown.add_row(*line)
    return shown


def markdown(section: Section) -> str:
    """The same in Markdown, without the peaks, and compared with the best other policy and `full` alone."""
    cells = _columns(section, compact=True)
    rule = ["---" if name == "policy" else "---:" for name in cells]
    lines = [list(cells), rule, *zip(*cells.values(), strict=True)]
    return "\n".join([f"### {section.sample.title}", "", *(f"| {' | '.join(line)} |" for line in lines)])


def _columns(section: Section, *, compact: bool) -> dict[str, list[str]]:
    """By its head, the cells of each column that has any."""
    rows, metrics = section.rows, section.sample.metrics
    first, baseline = metrics[0], section.sample.baseline
    rival = section.rivals.get(first.name)
    found = {
        "policy": [_label(row) for row in rows],
        "entries": [f"{row.entries:.0f}" for row in rows],
        "MB": [_megabytes(row.bytes) for row in rows],
        "peak MB": [_megabytes(row.peak_bytes) for row in rows if not compact],
        "slot MB": [_megabytes(row.slot_bytes) for row in rows],
    }
    found |= {metric.name: [_words(row.scores[metric.name], metric) for row in rows] for metric in metrics}
    if not compact:
        found[f"{first.name} less {baseline}"] = [
            "" if row.label == baseline else _words(row.baseline[first.name], first, "+") for row in rows
        ]
        found[f"{first.name} less {rival}"] = [
            "" if row.label == rival else _words(row.rival[first.name], first, "+")
            for row in rows
            if rival is not None
        ]
    found[f"{first.name} less the best other's"] = [_other(row, first) for row in rows]
    found[f"{first.name} / full's"] = [_relative(row, first) for row in rows]
    return {name: cells for name, cells in found.items() if any(cells)}


def _label(row: Row) -> str:
    if row.deviation is not None and not row.matched:
        return f"{row.label} (not matched: {row.deviation:+.2%})"
    if row.worst_deviation is not None and abs(row.worst_deviation) > TOLERANCE:
        return f"{row.label} (worst document: {row.worst_deviation:+.1%})"
    return row.label


def _other(row: Row, metric: Metric) -> str:
    if row.label == "full" or metric.name not in row.other:
        return ""
    return f"{_words(row.other[metric.name], metric, '+')} {row.others[metric.name]}"


def _relative(row: Row, metric: Metric) -> str:
    if row.label == "full" or metric.name not in row.relative:
        return ""
    return _interval(row.relative[metric.name], ".3f")


def _megabytes(count: float | None) -> str:
    return "" if count is None else f"{count / 1e6:.1f}"


def _words(found: Estimate, metric: Metric, sign: str = "") -> str:
    return _interval(found, f"{sign}.{metric.digits}f")


def _interval(found: Estimate, form: str) -> str:
    """One document, or a number that is the same for all, has no interval."""
    if found.low == found.high:
        return f"{found.value:{form}}"
    return f"{found.value:{form}} [{found.low:{form}}, {found.high:{form}}]"
