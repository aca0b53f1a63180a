from __future__ import annotations

import itertools

import pytest
import torch

from buzz import Cascade, PolicyError
from tests.buzz.driver import view_of


def positions(policy: Cascade, score: list[float], tokens: int, block: int = 1) -> list[int]:
    """What one head holds after so many tokens, `block` at a time, each of a score of its own for good."""
    held: list[int] = []
    for start in range(0, tokens, block):
        held += range(start, min(start + block, tokens))
        if policy.due(len(held), 0):
            view = view_of(torch.tensor([[score[token] for token in held]]), seen=held[-1] + 1)
            (index,) = policy.compact(view).index.tolist()
            held = [held[i] for i in index]
    return held


def test_nothing_is_thinned_until_the_buffers_are_full() -> None:
    policy = Cascade(sink=2, cascades=3, size=3, block=1)
    assert policy.bound == 11
    assert positions(policy, [0.0] * 11, 11) == list(range(11))
    assert not policy.due(11, 0)
    assert policy.due(12, 0)


def test_each_buffer_keeps_the_best_of_its_groups() -> None:
    policy = Cascade(sink=1, cascades=2, size=3, block=1)
    score = [0.0] * 7 + [1, 2, 2, 1, 5, 0, 0, 0, 0]
    # buffer 1 is offered 4, 5 | 6, 7 | 8, 9 | 10, 11 and keeps the better, the last of a tie
    assert positions(policy, score, 15) == [0, 7, 9, 11, 12, 13, 14]
    # 12 opens a group, and shifts
    assert positions(policy, score, 16) == [0, 9, 11, 12, 13, 14, 15]


@pytest.mark.parametrize(("halve", "spaces"), [(False, (1, 2, 8, 64)), (True, (1, 2, 4, 8))])
def test_each_buffer_is_sparser_than_the_one_before(halve: bool, spaces: tuple[int, ...]) -> None:
    policy = Cascade(sink=0, cascades=4, size=5, block=1, halve=halve)
    held = positions(policy, [0.0] * 1000, 1000)
    buffers = [held[15:], held[10:15], held[5:10], held[:5]]
    for buffer, space in zip(buffers, spaces, strict=True):
        settled = buffer[:-1]  # the last may yet be replaced
        assert [b - a for a, b in itertools.pairwise(settled)] == [space] * 3


@pytest.mark.parametrize("halve", [False, True])
def test_a_prompt_at_once_is_token_by_token_where_scores_stand_still(halve: bool) -> None:
    score = torch.rand(400, generator=torch.Generator().manual_seed(0)).tolist()
    policy = Cascade(sink=3, cascades=4, size=5, block=1, halve=halve)
    alone = positions(policy, score, 400)
    assert positions(policy, score, 400, block=400) == positions(policy, score, 400, block=37) == alone


def test_a_single_buffer_is_a_window_with_sinks() -> None:
    assert positions(Cascade(sink=2, cascades=1, size=4, block=1), [1.0] * 20, 20) == [0, 1, 16, 17, 18, 19]


def test_its_score_is_the_papers_moving_average_but_for_a_factor() -> None:
    (state,) = Cascade().states
    assert (state.kind, state.decay) == ("mass", 0.9999999)


def test_another_bound_is_shared_by_the_buffers_and_the_rest_are_sinks() -> None:
    assert Cascade().sized(1000) == Cascade(size=234)
    assert Cascade().sized(203) == Cascade(sink=23, size=45)
    assert Cascade().sized(80) == Cascade(sink=12, size=17)
    for bound in (3, 1, 0):
        with pytest.raises(PolicyError):
            Cascade().sized(bound)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"block": 0}, "block=0 is not between 1 and 5"),
        ({"block": 6}, "block=6 is not between 1 and 5"),
        ({"size": 0}, "all must stay"),
        ({"cascades": 0}, "cascades=0 is not between 1 and 16"),
        ({"cascades": 17}, "cascades=17 is not between 1 and 16"),
        ({"size": 2**19}, "a bound of"),
        ({"halve": 1}, "halve must be true or false, not 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, int], reason: str) -> None:
    with pytest.raises(PolicyError, match=reason):
        Cascade(**{"size": 5, "block": 2} | settings)
