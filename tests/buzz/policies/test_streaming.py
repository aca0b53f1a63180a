from __future__ import annotations

import pytest

from buzz import PolicyError, Streaming
from tests.buzz.driver import view_of


def test_a_block_goes_when_one_entry_is_too_many() -> None:
    policy = Streaming(sink=2, window=6, block=4)
    assert policy.bound == 8
    assert not policy.due(8, 0)
    assert policy.due(9, 0)
    assert policy.compact(view_of(n=9)).index.tolist() == [[0, 1, 6, 7, 8]] * 2


def test_a_block_of_one_is_eviction_per_token() -> None:
    assert Streaming(sink=1, window=3, block=1).compact(view_of(n=5)).index.tolist() == [[0, 2, 3, 4]] * 2


def test_a_long_prompt_goes_at_once() -> None:
    index = Streaming().compact(view_of(n=4000)).index[0]
    assert len(index) == 564 + 1 - 32
    assert index[:5].tolist() == [0, 1, 2, 3, 4000 - 529]


@pytest.mark.parametrize(
    "settings", [{"block": 0}, {"block": 7}, {"window": 0}, {"sink": -1}, {"sink": 2**20}]
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(PolicyError, match=r"is not between|all must stay"):
        Streaming(**{"window": 6, "block": 2} | settings)
