from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from buzz import Buzz, PolicyError
from tests.buzz.driver import view_of


def test_defaults_are_the_authors() -> None:
    policy = Buzz()
    assert (policy.sink, policy.window, policy.threshold, policy.stride) == (4, 160, 400, 5)
    assert policy.bound == 564
    assert [(state.name, state.kind, state.decay) for state in policy.states] == [("score", "mass", 1)]
    assert [state.per for state in (*policy.states, *Buzz(accumulate=False).states)] == ["session", "segment"]


def test_each_cell_keeps_each_heads_most_attended_entry() -> None:
    policy = Buzz(sink=1, window=2, threshold=1, stride=3)
    score = torch.tensor([[9.0, 1, 5, 2, 3, 3, 1, 0, 8, 7], [9.0, 1, 1, 2, 0, 0, 0, 6, 8, 7]])
    result = policy.compact(view_of(score))
    # the cells are 1-3, 4-6 and, shorter, 7; the first wins a tie
    assert result.index.tolist() == [[0, 2, 4, 7, 8, 9], [0, 3, 4, 7, 8, 9]]
    assert result.state["score"].tolist() == [[0, 5, 3, 0, 8, 7], [0, 2, 0, 6, 8, 7]]
    assert result.sampled == 3
    assert score[0, 0] == 9  # the input is not changed


def test_sampled_entries_are_thinned_by_interval_and_their_scores_restart() -> None:
    policy = Buzz(sink=1, window=1, threshold=1, stride=5)
    score = torch.arange(12.0).flip(0).expand(2, 3, 12)
    result = policy.compact(view_of(score, sampled=7))
    # sampled 1-7: every third; new 8-10: one cell
    assert result.index[1, 2].tolist() == [0, 1, 4, 7, 8, 11]
    assert result.state["score"][1, 2].tolist() == [0, 0, 0, 0, 3, 0]
    assert result.sampled == 4


def test_without_local_max_each_cell_keeps_its_first() -> None:
    policy = Buzz(sink=0, window=0, threshold=1, stride=4, local_max=False)
    result = policy.compact(view_of(torch.rand(2, 9)))
    assert result.index.tolist() == [[0, 4, 8]] * 2


def test_scores_that_are_not_finite_never_keep_an_entry_that_is_not_there() -> None:
    policy = Buzz(sink=0, window=0, threshold=1, stride=3)
    for value in (float("nan"), float("inf"), float("-inf")):
        result = policy.compact(view_of(torch.full((1, 4), value)))
        assert result.index.tolist() == [[0, 3]]


@given(
    sink=st.integers(0, 5),
    window=st.integers(0, 5),
    threshold=st.integers(1, 30),
    stride=st.integers(3, 40),
    extra=st.integers(1, 200),
    sampled=st.floats(0, 1),
)
def test_compaction_ends_below_the_threshold(
    sink: int, window: int, threshold: int, stride: int, extra: int, sampled: float
) -> None:
    policy = Buzz(sink=sink, window=window, threshold=threshold, stride=stride)
    n, old = policy.bound + extra, int(sampled * threshold)
    rounds = 0
    while policy.due(n, old):
        result = policy.compact(view_of(torch.zeros(1, n), old))
        n, old = result.index.shape[-1], result.sampled
        assert old == n - sink - window
        rounds += 1
        assert rounds <= 10
    assert sink + window < n <= policy.bound


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"stride": 2}, "stride=2 is less than 3: sampled entries would never shrink"),
        ({"stride": 0}, "stride=0 is less than 3"),
        ({"threshold": 0}, "threshold=0 is less than 1"),
        ({"sink": -1}, "sink=-1 is not between 0 and"),
        ({"window": -5}, "window=-5 is not between 0 and"),
        ({"log_n": 1}, "log_n=1 is less than 2"),
        ({"window": 2**20, "threshold": 1}, "a bound of 1048581 entries"),
        ({"window": 2**70}, "is not between 0 and 1048576"),
        ({"window": 1.0}, "window must be an integer, not 1.0"),
        ({"sink": True}, "sink must be an integer, not True"),
        ({"local_max": 1}, "local_max must be true or false, not 1"),
        ({"log_n": "x"}, "log_n must be an integer or none, not 'x'"),
        ({"positions": "both"}, "positions must be in_cache or original, not 'both'"),
    ],
)
def test_settings_that_make_no_sense_are_refused_with_a_reason(
    settings: dict[str, object], reason: str
) -> None:
    with pytest.raises(PolicyError, match=reason):
        Buzz(**settings)
