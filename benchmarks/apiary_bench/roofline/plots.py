"""A picture of steps beside their floors."""

from __future__ import annotations

from matplotlib.figure import Figure

from apiary_bench.roofline.part import Part
from apiary_bench.roofline.run import Result

_INCHES = (7.0, 4.5)
_WIDTH = 0.8
_GAP = 0.6  # between numbers of sessions


def steps(result: Result, title: str) -> Figure:
    """For each number of sessions two bars: the measured parts of a mean step, and its floor."""
    figure = Figure(figsize=_INCHES, layout="constrained")
    axes = figure.subplots()
    places = [(2 + _GAP) * number + side for number in range(len(result.rows)) for side in (0, 1)]
    bottoms = [0.0] * len(places)
    for number, part in enumerate(Part):
        found = (row_part.get(part, 0.0) for row in result.rows for row_part in (row.parts, row.floor))
        heights = [1000 * seconds for seconds in found]
        axes.bar(places, heights, _WIDTH, bottoms, label=part.value, color=f"C{number}")
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    labels = []
    for row in result.rows:
        labels += [f"{row.sessions}\n{row.mean / row.least:.2f}x", "floor"]
    axes.set_xticks(places, labels)
    axes.set_xlabel("sessions, and their mean step as a multiple of its floor")
    axes.set_ylabel("ms a step")
    axes.set_title(title.replace("; ", "\n"), fontsize="small")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize="small")
    return figure
