from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

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
    outcome = compact(Thinning(), view_of(score, sampled=1))
    assert outcome.index.tolist() == [[0, 4, 8]] * 2
    assert outcome.state["score"].tolist() == [[2, 6, 10]] * 2
    assert (outcome.sampled, outcome.merge) == (3, None)


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

    with pytest.raises(RuntimeError, match="at 5 entries: it is due, and its compaction changes nothing"):
        compact(Stuck(), view_of(torch.zeros(1, 5)))


N = 6


def made(index: object, sampled: int = 0, **more: Any) -> Callable[[View], Any]:
    """A rule that returns just this."""
    return lambda _: Compaction(torch.tensor(index), sampled, **more)


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        (lambda view: view.span(0, 3), "returned a tensor of torch.int64, and not a Compaction"),
        (lambda _: None, "returned a NoneType"),
        (lambda _: Compaction([[0, 1, 2]]), "is a list, and not a tensor of int64"),
        (made([[0.0, 1, 2]]), "is a tensor of torch.float32, and not a tensor of int64"),
        (made([[True, False, True]]), "is a tensor of torch.bool"),
        (made([0, 1, 2]), r"shape \[3\], and not \[1, m\]"),
        (lambda view: Compaction(view.span(0, 0)), r"shape \[1, 0\]"),
        (made([[0, 2, 1]]), "strictly ascending, from 0 to 5"),
        (made([[0, 1, 1]]), "strictly ascending"),
        (made([[-1, 0, 1]]), "strictly ascending"),
        (made([[0, 1, 6]]), "strictly ascending"),
        (made([[0, 1, 2]], 4), "4 of 3 survivors cannot be sampled"),
        (made([[0, 1, 2]], -1), "-1 of 3"),
        (lambda view: Compaction(view.span(0, N)), "changes nothing"),
        (lambda view: Compaction(view.span(0, N), view.sampled + 1), "7 of 6 survivors cannot be sampled"),
        (
            made([[0, 1, 2]], state={"scores": torch.zeros(1, 3)}),
            "the state 'scores', which it does not declare",
        ),
        (
            made([[0, 1, 2]], state={"score": torch.zeros(1, 6)}),
            r"'score' has the shape \[1, 6\], and not \[1, 3\]",
        ),
        (
            made([[0, 1, 2]], state={"score": torch.zeros(1, 3, dtype=torch.int64)}),
            "'score' is a tensor of torch.int64, and not a tensor of torch.float32",
        ),
        (made([[0, 1, 2]], state={"score": [[0.0] * 3]}), "'score' is a list"),
        (made([[0, 1, 2]], merge=torch.zeros(1, 3, dtype=torch.int64)), r"merge has the shape \[1, 3\]"),
        (made([[0, 1, 2]], merge=torch.tensor([[0, 1, 2, 3, 0, 0]])), "survivors 0 to 2 or nowhere"),
        (made([[0, 1, 2]], merge=torch.tensor([[0, 1, 2, -2, 0, 0]])), "survivors 0 to 2 or nowhere"),
        (made([[0, 1, 2]], merge=torch.tensor([[0, 0, 2, 0, 0, 0]])), "merged into itself"),
    ],
)
def test_what_a_policy_must_not_return(rule: Callable[[View], Any], why: str) -> None:
    class Wrong(Thinning):
        def compact(self, view: View) -> Compaction:
            found: Compaction = rule(view)
            return found

    with pytest.raises(RuntimeError, match=why):
        compact(Wrong(), view_of(torch.zeros(1, N)))
