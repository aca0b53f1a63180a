"""The pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from apiary_bench import pictures
from apiary_bench.errors import BenchError
from apiary_bench.peers import plots
from apiary_bench.peers.results import PointResult, Results, Run
from apiary_bench.peers.workload import Load

from .fakes import IDENTITY, measures, run, workload

ARGUMENTS: dict[str, Any] = {"peers": ["ours", "theirs"], "repeats": 1}
LOAD = Load(sessions=2, input=8, output=8)
SMALL = workload(LOAD)
GROWING = workload(LOAD, LOAD, name="growth-sessions", axis="sessions")


def growing(peer: str, *rates: float | None) -> Run:
    """A run with points of the sizes 1, 2, ..."""
    points = (
        PointResult(f"no. {size}", size, None if rate is None else measures(rate))
        for size, rate in enumerate(rates, 1)
    )
    return Run(peer, "growth-sessions", 0, IDENTITY, tuple(points))


def test_bars_are_the_rates_and_a_void_one_says_so() -> None:
    figure = plots.bars(Results(ARGUMENTS, [run("ours", 30.0), run("theirs", None)]), [SMALL])
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == [30.0, 0.0]  # type: ignore[attr-defined]
    assert {"30", "void"} <= {text.get_text() for text in axes.texts}
    assert axes.get_title() == "small, no. 1"


def test_a_curve_ends_where_an_engine_cannot_follow() -> None:
    figure = plots.growth(
        Results(ARGUMENTS, [growing("ours", 5.0, 6.0), growing("theirs", 4.0, None)]), GROWING
    )
    lines = {str(line.get_label()): line for line in figure.axes[0].lines}
    assert list(lines["ours"].get_xydata()[:, 1]) == [5.0, 6.0]  # type: ignore[index, call-overload]
    assert figure.axes[0].get_xlabel() == "sessions"
    assert list(lines["theirs"].get_xydata()[:, 0]) == [1.0]  # type: ignore[index, call-overload]


def test_an_engine_has_one_colour_everywhere() -> None:
    def colours(figure: Figure) -> set[object]:
        return {
            line.get_color() for axes in figure.axes for line in axes.lines if line.get_label() == "theirs"
        }

    both = plots.growth(Results(ARGUMENTS, [growing("ours", 5.0), growing("theirs", 4.0)]), GROWING)
    alone = plots.growth(Results(ARGUMENTS, [growing("theirs", 4.0)]), GROWING)
    assert colours(both) == colours(alone)
    assert len(colours(both)) == 1


def test_files_are_written_for_what_was_measured(tmp_path: Path) -> None:
    pictures.require(tmp_path / "pictures")
    results = Results(ARGUMENTS, [run("ours", 30.0), growing("ours", 5.0, 6.0)])
    written = pictures.save(tmp_path / "pictures", plots.figures(results, [SMALL, GROWING]))
    assert {path.name for path in written} == {"peers.png", "growth-sessions.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_where_none_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchError, match="pictures cannot be written"):
        pictures.require(tmp_path / "file" / "pictures")
    with pytest.raises(BenchError, match="pictures cannot be written"):
        pictures.save(
            tmp_path / "file" / "pictures", plots.figures(Results(ARGUMENTS, [run("ours", 30.0)]), [SMALL])
        )
