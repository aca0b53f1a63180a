from __future__ import annotations

import pytest
import torch
from torch import Tensor

from buzz import Buzz2, PolicyError, View


def view(score: list[float], norm: list[float] | None = None, seen: int | None = None) -> View:
    """One head."""
    n = len(score)
    norms = None if norm is None else torch.tensor([norm])
    position = torch.arange(n, dtype=torch.int32)[None]
    return View(0, seen or 10**6, position, {"score": torch.tensor([score])}, norms)


def survivors(policy: Buzz2, score: list[float], norm: list[float] | None = None) -> list[int]:
    index: Tensor = policy.compact(view(score, norm or [1.0] * len(score))).index
    return index[0].tolist()


def test_the_hot_stay_and_each_cell_of_the_others_keeps_its_best() -> None:
    policy = Buzz2(sink=1, window=1, hot=2, cells=3, block=1)
    assert policy.bound == 7
    assert policy.due(8, 0)
    assert not policy.due(7, 0)
    #        sink  cell     hot hot  cell     cell     window
    score = [0.0, 1.0, 2.0, 9.0, 8.0, 3.0, 1.0, 4.0, 7.0, 0.0]
    assert survivors(policy, score) == [0, 2, 3, 4, 5, 8, 9]


def test_the_first_wins_a_tie_everywhere() -> None:
    policy = Buzz2(sink=0, window=0, hot=1, cells=2, block=1)
    assert survivors(policy, [5.0] * 7) == [0, 1, 4]


def test_weights_are_weighed_with_the_squares_of_values() -> None:
    policy = Buzz2(sink=0, window=0, hot=1, cells=0, block=1)
    assert survivors(policy, [8.0, 1.0], [1.0, 3.0]) == [1]
    assert survivors(policy, [10.0, 1.0], [1.0, 3.0]) == [0]


@pytest.mark.parametrize(("mean", "kept"), [(False, 0), (True, 1)])
def test_a_score_counts_whole_or_per_query_since_the_entry_came(mean: bool, kept: int) -> None:
    policy = Buzz2(sink=0, window=0, hot=1, cells=0, block=1, horizon=1000, mean=mean)
    norm = [1.0, 1.0]
    young = view([2.9, 2.0], norm, seen=3)  # of three queries and two: 0.97 and 1.00 each
    assert policy.compact(young).index[0].tolist() == [kept]
    assert policy.compact(view([3.1, 2.0], norm, seen=3)).index[0].tolist() == [0]


def test_a_block_is_taken_from_both_kinds_alike() -> None:
    policy = Buzz2(sink=0, window=0, hot=6, cells=4, block=6)
    kept = survivors(policy, [float(i) for i in range(11)])
    assert len(kept) == 5
    assert kept[-3:] == [8, 9, 10]  # hot
    assert kept[:2] == [3, 7]  # cells 0-3 and 4-7


def test_defaults() -> None:
    policy = Buzz2()
    assert policy.bound == 564
    assert policy.states[0].decay == 1 - 1 / 512
    assert policy.sized(1000).bound == 1000


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"horizon": 1}, "horizon=1 is less than 2"),
        ({"hot": 0, "cells": 0}, "a bound of 68 leaves none to evict, since all must stay"),
        ({"hot": 3, "cells": 3, "block": 7}, "block=7 is not between 1 and 6"),
        ({"sink": 0, "window": 0, "hot": 0, "cells": 0}, "a bound of 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, int], reason: str) -> None:
    with pytest.raises(PolicyError, match=reason):
        Buzz2(**settings)


def test_it_needs_the_norms_of_values() -> None:
    with pytest.raises(ValueError, match="no norms"):
        Buzz2(sink=0, window=0, hot=1, cells=0, block=1).compact(view([1.0, 2.0]))
