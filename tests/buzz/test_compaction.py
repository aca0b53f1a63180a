from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from buzz import Compaction, Policy, State, View
from buzz.compaction import compact
from tests.buzz.driver import view_of


@dataclass(frozen=True, kw_only=True)
class Thinning(Policy):
    """Down to 3 entries: every second goes, and the others' scores grow by one, round by round."""

    name: ClassVar[str] = "thinning"

    @property
    def bound(self) -> int:
        return 3

    @property
    def states(self) -> tuple[State, ...]:
        return (State("score"),)

    def due(self, n: int, sampled: int) -> bool:
        return n > 3

    def compact(self, view: View) -> Compaction:
        index = view.span(0, view.n, 2)
        return Compaction(index, view.sampled + 1, {"score": view.state["score"].gather(-1, index) + 1})


def test_rounds_are_one_compaction() -> None:
    score = torch.arange(10.0).expand(2, 10)
    outcome = compact(Thinning(), view_of(score, sampled=5))
    assert outcome.index.tolist() == [[0, 4, 8]] * 2
    assert outcome.state["score"].tolist() == [[2, 6, 10]] * 2
    assert (outcome.sampled, outcome.merge) == (7, None)


def test_what_one_round_merges_the_next_may_drop() -> None:
    class Merging(Thinning):
        def compact(self, view: View) -> Compaction:
            """The first round merges each that goes into the one before."""
            merge = view.span(0, view.n) // 2 if view.sampled == 0 else None
            return Compaction(view.span(0, view.n, 2), view.sampled + 1, merge=merge)

    outcome = compact(Merging(), view_of(torch.zeros(1, 6)))
    assert outcome.merge is not None
    assert outcome.index.tolist() == [[0, 2, 4]]
    assert outcome.merge.tolist() == [[0, 0, 1, 1, 2, 2]]
    outcome = compact(Merging(), view_of(torch.zeros(1, 8)))
    assert outcome.merge is not None
    assert outcome.index.tolist() == [[0, 4]]
    assert outcome.merge.tolist() == [[0, 0, -1, -1, 1, 1, -1, -1]]


def test_a_policy_that_never_gets_done_is_an_error_not_a_hang() -> None:
    class Stuck(Thinning):
        def compact(self, view: View) -> Compaction:
            return Compaction(view.span(0, view.n), view.sampled)

    with pytest.raises(RuntimeError, match="is due at 5 entries and its compaction changes nothing"):
        compact(Stuck(), view_of(torch.zeros(1, 5)))
