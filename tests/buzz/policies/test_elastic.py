from __future__ import annotations

import pytest
import torch

from buzz import Elastic, PolicyError
from tests.buzz.driver import view_of


def test_a_prompt_is_merged_into_the_nearest_top_scored() -> None:
    policy = Elastic(sink=2, heavy=3, recent=1, distance=2, block=2)
    score = torch.tensor([[0.0, 0, 1, 0, 0, 0, 9, 0, 0, 0], [9.0, 9, 5, 5, 5, 0, 0, 0, 0, 9]])
    result = policy.compact(view_of(score))
    assert result.index.tolist() == [[0, 1, 2, 6, 9], [0, 1, 2, 3, 9]]  # the first wins a tie
    assert result.merge is not None
    # 4 is as near to 2 as to 6, and the earlier wins; nothing joins a sink or the recent
    assert result.merge.tolist() == [[0, 1, 2, 2, 2, 3, 3, 3, 3, 4], [0, 1, 2, 3, 3, 3, 3, 3, 3, 4]]
    assert dict(result.state) == {}


def test_what_is_before_the_first_survivor_joins_it_rather_than_a_sink() -> None:
    policy = Elastic(sink=1, heavy=2, recent=0, distance=0, block=2)
    result = policy.compact(view_of(torch.tensor([[0.0, 0, 0, 0, 0, 7]])))
    assert result.index.tolist() == [[0, 5]]
    assert result.merge is not None
    assert result.merge.tolist() == [[0, 1, 1, 1, 1, 1]]


def test_while_decoding_a_block_goes_at_a_fixed_distance_from_the_end() -> None:
    policy = Elastic(sink=1, heavy=6, recent=2, distance=3, block=2)
    assert policy.bound == 9
    assert not policy.due(9, 0)
    assert policy.due(10, 0)
    result = policy.compact(view_of(torch.rand(2, 10)))
    assert result.index.tolist() == [[0, 1, 2, 3, 4, 7, 8, 9]] * 2
    assert result.merge is None


def test_defaults_are_the_authors_distance_and_last_token() -> None:
    policy = Elastic()
    assert (policy.bound, policy.distance, policy.recent, policy.rest) == (564, 25, 1, 533)
    assert Elastic(heavy=40).evictable == 17  # the sinks stay


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"block": 0}, "block=0 is not between 1 and 6"),
        ({"block": 7}, "block=7 is not between 1 and 6"),
        ({"block": 4, "distance": 6}, "block=4 is not between 1 and 3"),
        ({"heavy": 0}, "all must stay"),
        ({"sink": -1}, "sink=-1 is not between 0 and"),
        ({"heavy": "x"}, "heavy must be an integer, not 'x'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, int], reason: str) -> None:
    with pytest.raises(PolicyError, match=reason):
        Elastic(**{"sink": 1, "heavy": 6, "recent": 2, "distance": 2, "block": 1} | settings)
