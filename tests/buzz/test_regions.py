from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hypothesis import given
from hypothesis import strategies as st

from buzz import Buzz2, Compaction, Kind, Policy, Region, View
from buzz.compaction import regions
from buzz.regions import in_order
from tests.buzz.strategies import policies


def test_regions_follow_each_other() -> None:
    ends = (Kind.SINK, 4), (Kind.CELL, 10), (Kind.MIDDLE, 7), (Kind.WINDOW, 12)
    assert in_order(12, *ends) == (
        Region(Kind.SINK, 0, 4),
        Region(Kind.CELL, 4, 10),
        Region(Kind.WINDOW, 10, 12),
    )
    assert in_order(3, *ends) == (Region(Kind.SINK, 0, 3),)
    assert in_order(0, *ends) == ()


@given(policies, st.integers(0, 200), st.integers(0, 200), st.floats(0, 1))
def test_all_entries_have_a_kind_whatever_the_counts(
    policy: Policy, n: int, more: int, sampled: float
) -> None:
    regions = policy.regions(n, int(n * sampled), n + more)
    assert [place for each in regions for place in range(each.start, each.stop)] == list(range(n))
    assert len({each.kind for each in regions}) == len(regions)


def test_what_stays_for_its_importance_alone_is_heavy() -> None:
    policy = Buzz2(sink=1, window=2, hot=5, cells=0, block=1)
    assert {each.kind for each in policy.regions(8, 0, 99)} == {Kind.SINK, Kind.HEAVY, Kind.WINDOW}


def test_what_is_pinned_comes_first() -> None:
    policy = Buzz2(sink=1, window=3, hot=3, cells=3, block=1, pinned=2)  # the rule has 2, 2 and 3
    kinds = [(each.kind, each.start, each.stop) for each in regions(policy, 10, 0, 99)]
    assert kinds == [(Kind.PINNED, 0, 2), (Kind.SINK, 2, 3), (Kind.CELL, 3, 8), (Kind.WINDOW, 8, 10)]
    assert regions(policy, 1, 0, 1) == (Region(Kind.PINNED, 0, 1),)


def test_a_policy_that_does_not_say_has_a_middle() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Own(Policy):
        name: ClassVar[str] = "own"

        @property
        def bound(self) -> int:
            return 9

        def due(self, n: int, sampled: int) -> bool:
            return n > 9

        def compact(self, view: View) -> Compaction:
            return Compaction(view.span(view.n - 9, view.n))

    assert Own().regions(7, 0, 20) == (Region(Kind.MIDDLE, 0, 7),)
