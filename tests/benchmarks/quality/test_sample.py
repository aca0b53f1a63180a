"""Samples from runs, and runs that are joined."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from apiary_bench.errors import BenchError
from apiary_bench.quality.bench import Bench
from apiary_bench.quality.run import Results
from apiary_bench.quality.sample import Sample, join
from apiary_bench.quality.settings import Settings
from apiary_bench.quality.tasks.task import Outcome
from apiary_server.sessions.pool import Pool, SlotLayout
from buzz import parse
from tests.benchmarks.quality.samples import sample
from tests.benchmarks.quality.small import SPECS, stage

KL = [{"kl": 0.0, "agreement": 1.0}] * 2


def test_slots_are_those_that_the_pool_leases(ours: Bench, data: Path) -> None:
    specs = ["full(bound=4095)", "h2o(heavy=60,recent=60)", "streaming", "buzz(window=20)"]
    scores = {"match": 1.0, "answer_nll": 1.0}

    def outcomes(smaller: str) -> list[Outcome]:
        ran = [specs[0], smaller, *specs[2:]]
        return [Outcome(spec, parse(spec).bound, 1, 1.0, 1, 1.0, scores) for spec in ran]

    results = Results(stage("qa10", ours, data), [outcomes("h2o(heavy=30,recent=30)"), outcomes(specs[1])])
    found = Sample.of(Settings(data=data, policies=SPECS), ours, results)
    assert (found.title, list(found.outcomes)) == ("qa10 (90 entries), 2 documents", ["full", *SPECS])
    for spec, size in zip(specs, found.slot_bytes.values(), strict=True):
        geometry, policy = ours.loaded.geometry, parse(spec)
        layout = SlotLayout.of(geometry, policy, 64)
        pool = Pool(
            geometry, 2**27, layout, workspaces=1, workspace_entries=64, device=ours.loaded.backend.device
        )
        lease = pool.lease(layout)
        assert lease is not None
        assert lease.bytes == size
        capacity = policy.bound + (64 if policy.evicts else 0)
        assert lease.buffers(policy.states).keys.shape[-2] == capacity


def test_runs_of_other_policies_over_the_same_documents_are_joined() -> None:
    one = sample("fidelity", {"full": KL, "h2o": KL}, slot_bytes={"full": None, "h2o": None})
    two = sample("fidelity", {"full": KL, "buzz": KL})
    other = sample("recall", {"full": [{"match": 0.5}]})
    joined, alone = join([one, other, two])
    assert list(joined.outcomes) == ["full", "h2o", "buzz"]
    assert joined.slot_bytes == {"full": 3_000_000, "h2o": None, "buzz": 3_000_000}
    assert alone == other


def test_runs_with_other_weights_are_told_apart() -> None:
    one, two = (sample("fidelity", {"full": KL, "h2o": KL}) for _ in range(2))
    joined = one.joined(replace(two, weights="int8"))
    assert list(joined.outcomes) == ["full", "h2o", "full, int8", "h2o, int8"]
    assert joined.slot_bytes["h2o, int8"] == one.slot_bytes["h2o"]


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (sample("fidelity", {"full": KL, "buzz": KL}, seed=1), "with seed 0 and 1"),
        (sample("fidelity", {"full": KL, "buzz": KL}, match=None), "with match bytes and None"),
        (sample("fidelity", {"full": KL[:1]}), "with documents 2 and 1"),
        (sample("fidelity", {"full": [KL[0], {"kl": 0.0, "agreement": 0.9}]}), "full has other scores"),
    ],
)
def test_runs_that_differ_in_more_are_not(other: Sample, why: str) -> None:
    with pytest.raises(BenchError, match=why):
        join([sample("fidelity", {"full": KL, "h2o": KL}), other])
