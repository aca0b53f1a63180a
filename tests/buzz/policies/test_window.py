from __future__ import annotations

import pytest

from buzz import PolicyError, Window
from tests.buzz.driver import view_of


def test_a_block_goes_when_one_entry_is_too_many() -> None:
    policy = Window(window=6, block=4)
    assert policy.bound == 6
    assert not policy.due(6, 0)
    assert policy.due(7, 0)
    assert policy.compact(view_of(n=7)).index.tolist() == [[4, 5, 6]] * 2


def test_a_long_prompt_goes_at_once() -> None:
    index = Window().compact(view_of(n=4000)).index
    assert index.tolist() == [list(range(4000 - 533, 4000))] * 2


@pytest.mark.parametrize("settings", [{"block": 0}, {"block": 7}, {"window": 0}, {"window": 2**21}])
def test_settings_that_make_no_sense_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(PolicyError, match="not between"):
        Window(**{"window": 6, "block": 2} | settings)
