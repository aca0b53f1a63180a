from __future__ import annotations

import pytest

from buzz import Full, PolicyError
from tests.buzz.driver import view_of


def test_nothing_is_ever_due() -> None:
    policy = Full(bound=10)
    assert not policy.due(10**9, 0)
    assert policy.compact(view_of(n=3)).index.tolist() == [[0, 1, 2]] * 2


def test_the_default_bound_is_the_models_length() -> None:
    assert Full().bound is None
    assert Full().resolve(8192) == Full(bound=8192)
    assert Full(positions="original").resolve(10) == Full(bound=10, positions="original")
    assert Full(bound=10).resolve(10) == Full(bound=10)


def test_a_bound_past_the_model_or_out_of_range_is_refused() -> None:
    with pytest.raises(PolicyError, match=r"full\(bound=11\) exceeds the model's 10 positions"):
        Full(bound=11).resolve(10)
    for bound in (0, -1, 2**20 + 1):
        with pytest.raises(PolicyError, match="is not between"):
            Full(bound=bound)
