"""The picture of steps beside their floors."""

from __future__ import annotations

import pytest

from apiary_bench.roofline import plots
from apiary_bench.roofline.part import Part
from tests.benchmarks.roofline.samples import RESULT


def test_bars_are_as_high_as_steps_and_floors() -> None:
    figure = plots.steps(RESULT, "model, policy; weights")
    (axes,) = figure.axes
    tops: dict[float, float] = {}
    for bar in axes.patches:
        middle = bar.get_x() + bar.get_width() / 2
        tops[middle] = max(tops.get(middle, 0.0), bar.get_y() + bar.get_height())
    assert [tops[place] for place in sorted(tops)] == pytest.approx([36, 16, 36, 16])
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["1\n2.25x", "floor", "16\n2.25x", "floor"]
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == list(Part)
    assert axes.get_title() == "model, policy\nweights"
