"""Pictures that a benchmark draws, as files in a directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from apiary_bench.errors import BenchError


def require(directory: Path) -> None:
    """Make the directory: better now than when all has been measured.

    Raises:
        BenchError: pictures cannot be written there.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchError(f"pictures cannot be written to {directory}: {error}") from error


def save(directory: Path, figures: Mapping[str, Figure]) -> list[Path]:
    """Write figures under their names.

    Raises:
        BenchError: one cannot be written.
    """
    mpl.use("Agg")  # no display is needed
    require(directory)
    try:
        for name, figure in figures.items():
            figure.savefig(directory / name, dpi=150)
    except OSError as error:
        raise BenchError(f"pictures cannot be written to {directory}: {error}") from error
    return [directory / name for name in figures]
