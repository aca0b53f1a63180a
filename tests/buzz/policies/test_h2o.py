from __future__ import annotations

import pytest
import torch

from buzz import H2O, PolicyError
from tests.buzz.driver import view_of


def test_each_head_keeps_its_heavy_hitters_in_order_and_the_recent() -> None:
    policy = H2O(heavy=3, recent=2, block=1)
    assert policy.bound == 5
    assert not policy.due(5, 0)
    assert policy.due(6, 0)
    score = torch.tensor([[1.0, 5, 2, 4, 9, 9], [3.0, 3, 3, 3, 0, 1]])
    result = policy.compact(view_of(score))
    assert result.index.tolist() == [[1, 2, 3, 4, 5], [0, 1, 2, 4, 5]]  # the first win a tie
    assert dict(result.state) == {}  # scores go on as they are


def test_a_block_goes_at_a_time() -> None:
    result = H2O(heavy=4, recent=0, block=3).compact(view_of(torch.tensor([[[1.0, 5, 2, 4, 9]]])))
    assert result.index.tolist() == [[[1, 4]]]


@pytest.mark.parametrize(
    "settings", [{"block": 0}, {"block": 5}, {"heavy": 0}, {"recent": -1}, {"recent": 2**20}]
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(PolicyError, match=r"is not between|all must stay"):
        H2O(**{"heavy": 4, "recent": 4, "block": 2} | settings)
