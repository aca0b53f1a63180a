"""Reading policies, and what a bench refuses."""

from __future__ import annotations

import pytest

from apiary_bench.errors import SettingsError
from apiary_bench.quality.bench import contenders, split_specs


def test_a_comma_list_respects_parentheses() -> None:
    text = "full,h2o, buzz(window=300,stride=3) ,streaming"
    assert split_specs(text) == ["full", "h2o", "buzz(window=300,stride=3)", "streaming"]


@pytest.mark.parametrize("text", ["buzz(window=300", "buzz)", "buzz((window=3))", "a)(b"])
def test_parentheses_that_do_not_match(text: str) -> None:
    with pytest.raises(SettingsError, match="parentheses do not match"):
        split_specs(text)


@pytest.mark.parametrize("text", ["", "h2o,,buzz", "h2o,"])
def test_an_empty_policy(text: str) -> None:
    with pytest.raises(SettingsError, match="empty policy"):
        split_specs(text)


def test_full_comes_first_whether_asked_for_or_not() -> None:
    for specs in (["h2o", "full"], ["h2o"]):
        found = contenders(specs, 8192)
        assert [each.label for each in found] == ["full", "h2o"]
        assert found[0].policy.bound == 8192


@pytest.mark.parametrize(
    ("specs", "why"),
    [
        (["honey"], "unknown policy 'honey'; known are buzz"),
        (["h2o", "h2o(heavy=282)"], "given twice"),
        (["full(bound=100)"], "only plain `full`"),
        (["streaming(window=9000)"], "8192 positions"),
    ],
)
def test_policies_that_make_no_sense(specs: list[str], why: str) -> None:
    with pytest.raises(SettingsError, match=why):
        contenders(specs, 8192)
