from __future__ import annotations

import pytest
import torch

from buzz import Corm, PolicyError
from tests.buzz.driver import view_of

SCORE = torch.tensor([9.0, 8, 7, 6, 5, 4, 3, 2, 1])
OLD, NEW = 90, 97  # of tokens 0 to 99, the last three are asked


def kept(vote: list[int], score: torch.Tensor = SCORE, block: int = 3) -> list[int]:
    policy = Corm(budget=8, recent=2, queries=3, block=block)
    view = view_of(score[None], vote=torch.tensor([vote], dtype=torch.int32), seen=100)
    result = policy.compact(view)
    assert dict(result.state) == {}  # scores and votes go on as they are
    (index,) = result.index.tolist()
    return index


def test_what_mattered_to_a_recent_query_stays_and_the_rest_fills_up_by_score() -> None:
    assert kept([OLD, OLD, OLD, OLD, NEW, NEW, OLD, OLD, OLD]) == [0, 1, 4, 5, 7, 8]


def test_what_mattered_is_capped_by_score() -> None:
    assert kept([NEW] * 9) == [0, 1, 2, 3, 7, 8]
    assert kept([OLD, NEW, NEW, NEW, NEW, NEW, NEW, OLD, OLD]) == [1, 2, 3, 4, 7, 8]


def test_the_first_wins_a_tie() -> None:
    assert kept([OLD, NEW, NEW, NEW, NEW, NEW, OLD, OLD, OLD], torch.zeros(9)) == [1, 2, 3, 4, 7, 8]
    assert kept([OLD, OLD, OLD, OLD, OLD, OLD, NEW, OLD, OLD], torch.zeros(9)) == [0, 1, 2, 6, 7, 8]


def test_the_last_of_the_queries_asked_is_the_boundary() -> None:
    assert kept([OLD] * 5 + [97, 96, 0, 0], block=6) == [5, 7, 8]


def test_a_block_goes_when_one_entry_is_too_many() -> None:
    policy = Corm(budget=8, recent=2)
    assert (policy.bound, policy.rest) == (8, 3)
    assert not policy.due(8, 0)
    assert policy.due(9, 0)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"block": 0}, "block=0 is not between 1 and 6"),
        ({"block": 7}, "block=7 is not between 1 and 6"),
        ({"recent": 8}, "corm: a bound of 8 leaves none to evict, since all must stay"),
        ({"queries": 0}, "queries=0 leaves no query"),
        ({"budget": 0, "recent": 0}, "a bound of 0 entries"),
        ({"budget": "8"}, "budget must be an integer, not '8'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, int], reason: str) -> None:
    with pytest.raises(PolicyError, match=reason):
        Corm(**{"budget": 8, "recent": 2, "block": 2} | settings)
