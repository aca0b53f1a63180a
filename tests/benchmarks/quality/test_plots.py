"""Pictures of small runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from apiary_bench.quality import plots
from apiary_bench.quality.bench import Bench
from apiary_bench.quality.journal import Journal
from apiary_bench.quality.memory import Segment, counts
from apiary_bench.quality.report import sections
from apiary_bench.quality.run import run
from apiary_bench.quality.sample import Sample
from apiary_bench.quality.settings import Settings
from buzz import parse
from tests.benchmarks.quality.small import SPECS, silent, stage


def test_pictures(ours: Bench, data: Path, tmp_path: Path) -> None:
    settings = Settings(data=data, tasks=("qa10",), policies=SPECS, entries=(90,))
    here = stage("qa10", ours, data, limit=1)
    results = run(ours, [here], Journal(None), silent)
    found = sections([Sample.of(settings, ours, results[0])])
    made = plots.draw(tmp_path / "new", ours, results, found)
    assert [path.name for path in made] == ["qa10.png", "kept.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)
    shares = plots.kept_shares(ours, results[0])
    assert list(shares) == list(SPECS)
    tokens = len(here.task.prompt(here.documents[0]))
    for share, outcome in zip(shares.values(), results[0].outcomes[0][1:], strict=True):
        assert share.shape == (2, min(512, tokens))
        ((_, kept),) = counts(parse(outcome.policy), (Segment(tokens, 1),))
        assert share.mean() * tokens == pytest.approx(kept, rel=0.05)
        assert share[:, -1].min() == 1  # the most recent tokens
