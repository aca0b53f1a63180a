"""Results as one table: for a terminal, and for a page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rich.table import Table

from apiary_bench.peers.measures import Measures
from apiary_bench.peers.results import Results, Row
from apiary_bench.peers.workload import Rate, Workload

_TEXT = {"workload", "engine", "weights / cache", "void, because"}
_KINDS = {Rate.DECODE: "decoding", Rate.OUTPUT: "answering", Rate.PREFILL: "reading"}
_NUMBERS: dict[str, Callable[[Measures], float | None]] = {
    "tokens/s": lambda found: found.rate,
    "step ms": lambda found: _times(found.step, 1000),
    "TTFT mean s": lambda found: found.ttft_mean,
    "TTFT max s": lambda found: found.ttft_max,
    "turn mean s": lambda found: found.turn_mean,
    "turn max s": lambda found: found.turn_max,
    "memory MiB": lambda found: _times(found.memory_bytes, 1 / 2**20),
}


def table(results: Results, workloads: Sequence[Workload]) -> Table:
    """All of it for people. `x ENGINE` is a row's tokens/s by that engine's, at the same point."""
    shown = Table(title="medians" if results.arguments["repeats"] > 1 else None, title_justify="left")
    columns = _columns(results, workloads)
    for name in columns:
        shown.add_column(
            name,
            justify="left" if name in _TEXT else "right",
            overflow="fold",
            no_wrap=name not in _TEXT,
        )
    rows = list(zip(*columns.values(), strict=True))
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        shown.add_row(*row, end_section=following is None or following[0] != row[0])
    return shown


def markdown(results: Results, workloads: Sequence[Workload]) -> str:
    """The same in Markdown."""
    columns = _columns(results, workloads)
    rule = ["---" if name in _TEXT else "---:" for name in columns]
    lines = [list(columns), rule, *zip(*columns.values(), strict=True)]
    return "\n".join(f"| {' | '.join(cell.replace('|', ' ') for cell in line)} |" for line in lines)


def notes(results: Results) -> list[str]:
    """How each engine was set up, one line each."""
    found: dict[str, str] = {}
    for run in results.runs:
        if run.identity is not None:
            found.setdefault(run.peer, f"{run.peer} {run.identity.version}: {run.identity.settings}")
    return list(found.values())


def _columns(results: Results, workloads: Sequence[Workload]) -> dict[str, list[str]]:
    """By its head, the cells of each column that has any."""
    rows = [(workload, row) for workload in workloads for row in results.rows(workload.name)]
    rivals = [name for name in results.arguments["peers"] if not name.startswith("apiary")]
    found = {
        "workload": [f"{workload.name}, {row.label}, {_KINDS[workload.rate]}" for workload, row in rows],
        "engine": [_engine(row) for _, row in rows],
        "weights / cache": [_precision(row) for _, row in rows],
        "budget": [_budget(row) for _, row in rows],
    }
    for name, number in _NUMBERS.items():
        found[name] = [_number(None if row.measures is None else number(row.measures)) for _, row in rows]
    for rival in rivals:
        found[f"x {rival}"] = list(_ratios(rows, rival))
    found["void, because"] = [row.void or "" for _, row in rows]
    return {name: cells for name, cells in found.items() if any(cells)}


def _ratios(rows: Sequence[tuple[Workload, Row]], rival: str) -> Iterator[str]:
    rates = {
        (workload.name, row.label): row.measures.rate
        for workload, row in rows
        if row.peer == rival and row.measures is not None
    }
    for workload, row in rows:
        against = rates.get((workload.name, row.label))
        if against is None or row.measures is None or row.peer == rival:
            yield ""
        else:
            yield f"{row.measures.rate / against:.2f}"


def _engine(row: Row) -> str:
    return row.peer if row.identity is None else f"{row.peer} {row.identity.version}"


def _precision(row: Row) -> str:
    return "" if row.identity is None else f"{row.identity.weights} / {row.identity.cache}"


def _budget(row: Row) -> str:
    return "" if row.identity is None else f"{row.identity.budget_bytes / 2**30:.3g} GiB"


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _number(value: float | None) -> str:
    """Three digits, or all before the point."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
