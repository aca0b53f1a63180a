"""Pictures of small runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from torch import Tensor

from apiary_bench.quality import plots
from apiary_bench.quality.bench import Bench
from apiary_bench.quality.ensemble import Ensemble
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


@pytest.mark.parametrize("name", ["wikitext", "qa10", "recall"])
def test_what_is_kept_is_what_the_task_itself_would_keep(name: str, ours: Bench, data: Path) -> None:
    here = stage(name, ours, data, limit=1)
    (results,) = run(ours, [here], Journal(None), silent)
    shares = plots.kept_shares(ours, results)
    assert list(shares) == list(SPECS)
    trace = tuple(Segment(len(segment), 1) for segment in here.task.segments(here.documents[0]))
    tokens = sum(segment.tokens for segment in trace)
    for share, outcome in zip(shares.values(), results.outcomes[0][1:], strict=True):
        assert share.shape == (2, min(512, tokens))
        *_, (_, kept) = counts(parse(outcome.policy), trace)
        assert share.mean() * tokens == pytest.approx(kept, rel=0.05)
        assert share[:, -1].min() == 1  # the most recent tokens


def test_segments_are_those_that_tasks_feed(ours: Bench, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Ensemble.read
    for name in ("wikitext", "qa10", "recall"):
        here = stage(name, ours, data, limit=1)
        fed: list[list[int]] = []

        def listen(
            ensemble: Ensemble, tokens: Sequence[int], at: Sequence[int] = (), heard: list[list[int]] = fed
        ) -> list[Tensor]:
            heard.append(list(tokens))
            return read(ensemble, tokens, at)

        monkeypatch.setattr(Ensemble, "read", listen)
        run(ours, [here], Journal(None), silent)
        assert fed == [list(segment) for segment in here.task.segments(here.documents[0])]
