"""Results as pictures: bars of tokens per second, and curves of growth."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from apiary_bench.peers.measures import Measures
from apiary_bench.peers.results import Results, Row
from apiary_bench.peers.workload import Workload

_INCHES = (10.0, 4.0)


def figures(results: Results, workloads: Sequence[Workload]) -> dict[str, Figure]:
    """By file name: `peers.png` of the workloads with few points, and one picture of each that grows."""
    growing = [workload for workload in workloads if workload.axis is not None]
    others = [workload for workload in workloads if workload.axis is None]
    found = {f"{workload.name}.png": growth(results, workload) for workload in growing}
    if others:
        found["peers.png"] = bars(results, others)
    return found


def bars(results: Results, workloads: Sequence[Workload]) -> Figure:
    """A panel for each point, a bar for each engine; what is void has none."""
    groups: dict[str, list[Row]] = {}
    for workload in workloads:
        for row in results.rows(workload.name):
            groups.setdefault(f"{workload.name}, {row.label}", []).append(row)
    figure = Figure(figsize=_INCHES, layout="constrained")
    panels = figure.subplots(1, max(1, len(groups)), squeeze=False, sharey=True)[0]
    for axes, (title, rows) in zip(panels, groups.items(), strict=False):
        rates = [0.0 if row.measures is None else row.measures.rate for row in rows]
        labels = ["void" if row.measures is None else f"{row.measures.rate:,.0f}" for row in rows]
        drawn = axes.barh(
            [row.peer for row in rows], rates, color=[_color(results, row.peer) for row in rows]
        )
        axes.bar_label(drawn, labels, padding=2, fontsize="small")
        axes.margins(x=0.25)
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("tokens/s")
    panels[0].invert_yaxis()
    return figure


def growth(results: Results, workload: Workload) -> Figure:
    """Tokens per second, the time of a step and memory against size; a curve ends where an engine cannot
    follow."""
    figure = Figure(figsize=_INCHES, layout="constrained")
    panels = figure.subplots(1, 3)
    rows = list(results.rows(workload.name))
    _curves(panels[0], results, rows, "tokens/s", lambda found: found.rate)
    _curves(panels[1], results, rows, "step, ms", lambda found: found.step and 1000 * found.step)
    _curves(
        panels[2],
        results,
        rows,
        "resident memory, MiB",
        lambda found: found.memory_bytes and found.memory_bytes / 2**20,
    )
    for axes in panels:
        axes.set_xlabel(workload.axis)
    panels[0].legend(fontsize="small")
    figure.suptitle(workload.about)
    return figure


def _curves(
    axes: Axes,
    results: Results,
    rows: Sequence[Row],
    label: str,
    number: Callable[[Measures], float | None],
) -> None:
    for peer in dict.fromkeys(row.peer for row in rows):
        points = [
            (row.size, value)
            for row in rows
            if row.peer == peer and row.measures is not None and (value := number(row.measures)) is not None
        ]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=peer, color=_color(results, peer))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)


def _color(results: Results, peer: str) -> str:
    """The same in all pictures."""
    return f"C{list(results.arguments['peers']).index(peer)}"
