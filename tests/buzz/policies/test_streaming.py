from __future__ import annotations

import pytest

from buzz import PolicyError, Streaming


def test_a_block_goes_when_one_entry_is_too_many() -> None:
    policy = Streaming(sink=2, window=6, block=4)
    assert policy.bound == 8
    assert not policy.due(8, 0)
    assert policy.due(9, 0)
    assert policy.compact(9, 0, None).index.tolist() == [0, 1, 6, 7, 8]


def test_a_block_of_one_is_eviction_per_token() -> None:
    assert Streaming(sink=1, window=3, block=1).compact(5, 0, None).index.tolist() == [0, 2, 3, 4]


def test_a_long_prompt_goes_at_once() -> None:
    index = Streaming().compact(4000, 0, None).index
    assert len(index) == 564 + 1 - 32
    assert index[:5].tolist() == [0, 1, 2, 3, 4000 - 529]


@pytest.mark.parametrize(
    "settings", [{"block": 0}, {"block": 7}, {"window": 0}, {"sink": -1}, {"sink": 2**20}]
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(PolicyError, match="is not between"):
        Streaming(**{"window": 6, "block": 2} | settings)
