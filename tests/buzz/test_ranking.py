from __future__ import annotations

import torch

from buzz.ranking import top


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
