"""Estimates and paired comparisons of given scores."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from apiary_bench.quality.report import Row, Section, sections
from tests.benchmarks.quality.samples import sample


def by_label(section: Section) -> dict[str, Row]:
    return {row.label: row for row in section.rows}


def test_the_best_other_is_of_another_name_and_evicts() -> None:
    level = {"full": 0, "buzz2": 1, "buzz2(positions=in_cache)": 2, "cascade": 3, "h2o": 4, "streaming": 5}
    scores = {
        label: [{"kl": value + noise, "agreement": value - noise} for noise in (0.0, 0.5, 7.0)]
        for label, value in level.items()
    }
    (section,) = sections([sample("fidelity", scores)])
    rows = by_label(section)
    assert section.rivals == {"kl": "h2o", "agreement": "streaming"}
    assert {label: row.others["kl"] for label, row in rows.items()} == {
        "full": "buzz2",
        "buzz2": "cascade",
        "buzz2(positions=in_cache)": "cascade",
        "cascade": "buzz2",
        "h2o": "buzz2",
        "streaming": "buzz2",
    }
    assert rows["buzz2"].others["agreement"] == "streaming"
    other = rows["buzz2(positions=in_cache)"].other["kl"]
    assert (other.value, other.low, other.high) == pytest.approx((-1, -1, -1))  # paired: no noise is left
    assert rows["buzz2"].rival["kl"].value == pytest.approx(-3)
    assert rows["h2o"].baseline["kl"].value == pytest.approx(4)


def test_a_part_of_the_full_cache_is_paired() -> None:
    rouge = [10.0, 20.0, 60.0]

    def scores(factor: float) -> list[dict[str, float]]:
        return [{"ROUGE-L": factor * each, "ROUGE-1": factor * each, "ROUGE-2": 0.0} for each in rouge]

    (section,) = sections([sample("xsum", {"full": scores(1), "h2o": scores(0.97)})])
    found = by_label(section)["h2o"].relative
    assert set(found) == {"ROUGE-L", "ROUGE-1"}  # there is no part of 0
    assert (found["ROUGE-L"].value, found["ROUGE-L"].low) == pytest.approx((0.97, 0.97))


def test_perplexity_has_a_part_and_divergence_none() -> None:
    nll = {"full": [2.0, 3.0], "h2o": [2.1, 3.1]}
    (section,) = sections(
        [sample("wikitext", {name: [{"perplexity": each} for each in row] for name, row in nll.items()})]
    )
    assert by_label(section)["h2o"].relative["perplexity"].value == pytest.approx(np.exp(0.1))
    (section,) = sections([sample("fidelity", {"full": [{"kl": 1.0}], "h2o": [{"kl": 1.0}]})])
    assert by_label(section)["h2o"].relative == {}


def test_the_worst_document_stands_beside_the_mean() -> None:
    scores = {label: [{"kl": 1.0}] * 3 for label in ("full", "h2o", "buzz", "corm")}
    held = {"h2o": [1100.0, 880.0, 1020.0], "buzz": [1030.0, 1030.0, 1030.0]}
    (section,) = sections([sample("fidelity", scores, held=held)])
    rows = by_label(section)
    assert (rows["full"].deviation, rows["full"].worst_deviation, rows["full"].matched) == (None, None, None)
    assert (rows["h2o"].deviation, rows["h2o"].worst_deviation) == pytest.approx((0, -0.12))
    assert rows["h2o"].matched is True
    assert rows["buzz"].worst_deviation == pytest.approx(0.03)
    assert rows["buzz"].matched is False
    assert rows["corm"].worst_deviation == 0
    (entries,) = sections([replace(sample("fidelity", scores, held=held), match="entries")])
    assert by_label(entries)["buzz"].matched is None  # by their bytes they were not to match
