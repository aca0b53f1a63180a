from __future__ import annotations

import pytest
import torch

from buzz.ranking import honeycomb, top


def test_the_largest_in_order_and_the_first_of_a_tie() -> None:
    score = torch.tensor([[[3.0, 1, 3, 2, 3], [0.0, 0, 0, 0, 0]]])
    assert top(score, 2).tolist() == [[[0, 2], [0, 1]]]
    assert top(score, 4).tolist() == [[[0, 2, 3, 4], [0, 1, 2, 3]]]
    assert top(score, 0).shape == (1, 2, 0)


def test_the_preferred_come_first() -> None:
    score = torch.tensor([5.0, 1, 4, 1, 3, 1])
    preferred = torch.tensor([False, True, False, True, False, True])
    assert top(score, 2, preferred).tolist() == [1, 3]
    assert top(score, 4, preferred).tolist() == [0, 1, 3, 5]
    assert top(score, 3, torch.ones(6, dtype=torch.bool)).tolist() == top(score, 3).tolist() == [0, 2, 4]


def test_ties_among_many_are_broken_the_same_way() -> None:
    score = torch.randint(0, 3, (4, 2000), generator=torch.Generator().manual_seed(0)).float()
    expected = [sorted(sorted(range(2000), key=lambda i: (-row[i], i))[:700]) for row in score.tolist()]
    assert top(score, 700).tolist() == expected


def test_votes_are_whole_numbers() -> None:
    assert top(torch.tensor([3, 9, 9, 4], dtype=torch.int32), 2).tolist() == [1, 2]


@pytest.mark.parametrize("count", [1, 3, 5])
def test_what_is_not_finite_has_a_rank(count: int) -> None:
    inf, nan = torch.inf, torch.nan
    score = torch.tensor([[nan, 1, -inf, inf, nan], [-inf] * 5, [nan] * 5])
    expected = [[0, 3, 4, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert top(score, count).tolist() == [sorted(row[:count]) for row in expected]


def test_the_hot_and_the_best_of_each_cell() -> None:
    score = torch.tensor([[1.0, 9, 2, 8, 2, 3, 1, 7]])
    assert honeycomb(score, 3, 2).tolist() == [[1, 2, 3, 5, 7]]  # cells of 0, 2 and of 4, 5, 6
    assert honeycomb(score, 0, 4).tolist() == [[1, 3, 5, 7]]
    assert honeycomb(score, 6, 0).tolist() == [[1, 2, 3, 4, 5, 7]]
    assert honeycomb(torch.zeros(1, 8), 3, 2).tolist() == [[0, 1, 2, 3, 5]]


@pytest.mark.parametrize(("hot", "cells"), [(9, 0), (5, 4), (-1, 3), (0, 9), (9, -1)])
def test_a_honeycomb_is_of_entries_that_there_are(hot: int, cells: int) -> None:
    with pytest.raises(ValueError, match="are not among 8 entries"):
        honeycomb(torch.zeros(1, 8), hot, cells)
