"""Pictures: quality against memory, and which tokens of a document each policy kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from apiary_bench.pictures import save
from apiary_bench.quality.bench import Bench
from apiary_bench.quality.ensemble import Ensemble
from apiary_bench.quality.report import Section
from apiary_bench.quality.run import Results, Stage
from buzz import parse

_INCHES = (7.0, 4.5)
_COLUMNS = 512  # of a map: positions share one where there are more


def draw(directory: Path, bench: Bench, results: Sequence[Results], found: Sequence[Section]) -> list[Path]:
    """Draw all: `TASK.png` for each task, and `kept.png` for the first document.

    Raises:
        BenchError: a picture cannot be written.
    """
    figures = {}
    for name, same in groupby(found, key=lambda section: section.sample.task):
        figures[f"{name}.png"] = quality(list(same))
    figures["kept.png"] = kept(bench, results[0])
    return save(directory, figures)


def quality(same: Sequence[Section]) -> Figure:
    """A task's first metric against average memory: a line for each policy, a point for each budget."""
    sample = same[0].sample
    metric = sample.metrics[0]
    figure = Figure(figsize=_INCHES, layout="constrained")
    axes = figure.subplots()
    for i, row in enumerate(same[0].rows):
        points = sorted((section.rows[i] for section in same), key=lambda each: each.bytes)
        estimates = [point.scores[metric.name] for point in points]
        below = [each.value - each.low for each in estimates]
        above = [each.high - each.value for each in estimates]
        axes.errorbar(
            [point.bytes / 1e6 for point in points],
            [each.value for each in estimates],
            yerr=[below, above],
            marker="o",
            capsize=2,
            label=row.label,
        )
    axes.set_xlabel("average memory of a session's cache, MB")
    axes.set_ylabel(f"{metric.name} ({metric.better} is better)")
    axes.set_title(f"{sample.task}, {sample.documents} documents, 95% intervals")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def kept(bench: Bench, results: Results) -> Figure:
    """What each policy keeps of a stage's first document when it has read it: by layer and position, the
    share of heads that keep a token."""
    stage = results.stage
    shares = kept_shares(bench, results)
    columns = 2
    rows = math.ceil(len(shares) / columns)
    figure = Figure(figsize=(_INCHES[0] * 1.6, 1.6 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat
    image = None
    for axes, (label, share) in zip(panels, shares.items(), strict=False):
        image = axes.imshow(
            share, aspect="auto", vmin=0, vmax=1, cmap="magma", extent=_extent(stage, share.shape[0])
        )
        axes.set_title(label, fontsize="small")
        axes.set_ylabel("layer")
    for axes in list(panels):
        axes.set_axis_off()
    if image is not None:
        figure.colorbar(image, ax=figure.axes, label="share of heads")
    figure.suptitle(f"{stage.name}: tokens kept of the first document")
    figure.supxlabel("position")
    return figure


def kept_shares(bench: Bench, results: Results) -> dict[str, NDArray[np.float32]]:
    """For each policy but the full one, the share of heads that keep a token when the first document has been
    read as the task reads it: `[layers, columns]`, where a column stands for one position, or the mean of
    several."""
    segments = results.stage.task.segments(results.stage.documents[0])
    tokens = sum(map(len, segments))
    policies = [parse(outcome.policy) for outcome in results.outcomes[0]]
    ensemble = Ensemble(bench.loaded, policies, tokens)
    ensemble.resize(policies, max(map(len, segments[1:]), default=1))  # the first is read in a trunk
    with torch.inference_mode():
        for segment in segments:
            ensemble.read(segment)
            ensemble.end()
    found = {}
    for contender, cache in zip(bench.contenders[1:], ensemble.caches[1:], strict=True):
        position = cache.buffers.position[:, :, : cache.n].long().cpu()
        holds = torch.zeros(*position.shape[:2], tokens)
        holds.scatter_(-1, position, 1.0)
        share = torch.nn.functional.adaptive_avg_pool1d(holds.mean(dim=1), min(_COLUMNS, tokens))
        found[contender.label] = share.numpy()
    return found


def _extent(stage: Stage, layers: int) -> tuple[float, float, float, float]:
    return 0, sum(map(len, stage.task.segments(stage.documents[0]))), layers, 0
