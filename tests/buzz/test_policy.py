from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from buzz import (
    H2O,
    MAX_STATES,
    Buzz,
    Cascade,
    Full,
    Policy,
    PolicyError,
    State,
    Streaming,
    names,
    parse,
)
from buzz.policies.blockwise import Blockwise

ALL = [parse(name) for name in names()]
BOUNDED = [policy for policy in ALL if policy.name != "full"]


@pytest.mark.parametrize("policy", ALL, ids=lambda policy: policy.name)
def test_a_policy_is_an_immutable_value(policy: Policy) -> None:
    assert dataclasses.replace(policy) == policy
    assert hash(dataclasses.replace(policy)) == hash(policy)
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.positions = "original"  # type: ignore[misc]
    with pytest.raises(TypeError):
        type(policy)("original")  # settings go by name only


@pytest.mark.parametrize("policy", BOUNDED, ids=lambda policy: policy.name)
def test_a_bound_must_leave_a_position_for_the_next_token(policy: Policy) -> None:
    assert policy.resolve(565) is policy
    with pytest.raises(PolicyError, match="holds up to 564 entries, and the model has 564 positions"):
        policy.resolve(564)


def test_the_canonical_specification_has_all_sizes_and_the_options_that_differ() -> None:
    assert str(Buzz(window=300)) == "buzz(sink=4,window=300,threshold=400,stride=5)"
    assert str(Buzz(local_max=False, accumulate=False, log_n=512, positions="original")) == (
        "buzz(sink=4,window=160,threshold=400,stride=5,local_max=false,accumulate=false,log_n=512,positions=original)"
    )
    assert str(Full()) == "full"
    assert str(Full(bound=7)) == "full(bound=7)"
    assert str(H2O()) == "h2o(heavy=282,recent=282)"
    assert str(Streaming(block=32)) == "streaming(sink=4,window=560,block=32)"


def test_only_buzz_scales_logits() -> None:
    assert {policy.log_n for policy in ALL} == {None}
    assert Buzz(log_n=512).log_n == 512


@pytest.mark.parametrize("policy", BOUNDED, ids=lambda policy: policy.name)
def test_defaults_hold_as_much_as_the_papers_buzz(policy: Policy) -> None:
    assert policy.bound == 564
    assert policy.evicts


def test_a_policy_of_ones_own_is_checked_as_ours_are() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Own(Full):
        count: int = 0

        name = "own"

        @property
        def states(self) -> tuple[State, ...]:
            return tuple(State(f"score {i}") for i in range(self.count))

        def validate(self) -> None:
            if self.count == 1:
                raise PolicyError("own: count=1")

    assert len(Own(count=MAX_STATES).states) == 2
    with pytest.raises(PolicyError, match="own: 3 states are declared, and there is room for 2"):
        Own(count=3)
    with pytest.raises(PolicyError, match="own: count=1"):
        Own(count=1)
    with pytest.raises(PolicyError, match="own: a bound of 0 entries is not between 1 and"):
        Own(bound=0)


@pytest.mark.parametrize(
    ("own", "why"),
    [
        ({"states": property(lambda self: State("score"))}, "own: states must be a tuple, as"),
        ({"states": property(lambda self: ("score",))}, "own: states must be a tuple, as"),
        (
            {"states": property(lambda self: (State("score"), State("score", "vote")))},
            "own: states must differ by name, and these are score, score",
        ),
        ({"states": lambda self: (State("score"),)}, "Own: states is a method; put @property above it"),
        ({"bound": lambda self: 9}, "Own: bound is a method"),
        ({"rest": lambda self: 9}, "Own: rest is a method"),
        ({"bound": property(lambda self: 9.0)}, "own: bound must be an integer, not 9.0"),
        ({"sizes": ("windows",)}, r"own: sizes=\('windows',\) is not a tuple of settings; .* sink, window$"),
        ({"sizes": "window"}, "own: sizes='window' is not a tuple"),
    ],
)
def test_what_a_class_got_wrong_is_said_when_a_policy_is_made(own: dict[str, Any], why: str) -> None:
    made = dataclasses.dataclass(frozen=True, kw_only=True)(type("Own", (Streaming,), {"name": "own", **own}))
    with pytest.raises(PolicyError, match=why):
        made()


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"name": ""}, "name must be text, not ''"),
        ({"name": 3}, "name must be text, not 3"),
        ({"kind": "mas"}, "state 'score': kind must be mass or vote, not 'mas'"),
        ({"per": "token"}, "state 'score': per must be session or segment, not 'token'"),
        ({"decay": "0.5"}, "decay='0.5' is not above 0 and at most 1"),
    ],
)
def test_a_state_is_checked(wrong: dict[str, Any], why: str) -> None:
    with pytest.raises(PolicyError, match=why):
        State(**{"name": "score", **wrong})


def test_a_policy_that_would_quantise_nothing_is_refused() -> None:
    assert parse("window(window=160,kivi=4)").sized(200).bound == 200
    least = parse("window(window=32,kivi=2,residual=0)")
    assert least.residual == 0
    with pytest.raises(PolicyError, match="residual=127 or less, or a bound of 160 or more"):
        parse("window(window=159,kivi=4)")
    with pytest.raises(PolicyError, match=r"would quantise nothing: .*; choose a bound of 32 or more"):
        parse("window(window=31,kivi=4,residual=0)")
    with pytest.raises(PolicyError, match="would quantise nothing"):
        parse("full(kivi=4)").resolve(159)


@pytest.mark.parametrize(("bound", "residual"), [(564, 128), (160, 128), (159, 127), (90, 58)])
def test_a_bound_that_has_no_room_for_the_residual_makes_it_smaller(bound: int, residual: int) -> None:
    scaled = parse("buzz2(kivi=4)").sized(bound)
    assert (scaled.bound, scaled.residual) == (bound, residual)


def test_a_bound_that_has_no_room_for_quantised_entries_is_refused() -> None:
    with pytest.raises(PolicyError, match="would quantise nothing"):
        parse("window(kivi=4)").sized(31)


@pytest.mark.parametrize("wrong", [{"decay": 0.5}, {"per": "segment"}])
def test_a_vote_has_nothing_of_a_mass(wrong: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match="state 'last': a vote has no decay"):
        State("last", "vote", **wrong)


@pytest.mark.parametrize("decay", [0, -0.5, 1.5, float("nan")])
def test_a_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(PolicyError, match=r"state 'score': decay=.* is not above 0 and at most 1"):
        State("score", decay=decay)


def test_only_attention_scores_that_are_needed_are_recorded() -> None:
    recorded = {policy.name: [state.name for state in policy.states] for policy in ALL}
    assert recorded["full"] == recorded["window"] == recorded["streaming"] == []
    assert recorded["corm"] == ["score", "vote"]


@pytest.mark.parametrize("name", names())
def test_a_setting_of_the_wrong_type_is_refused(name: str) -> None:
    for field in dataclasses.fields(type(parse(name))):
        with pytest.raises(PolicyError, match=f"{name}: {field.name} must be .*, not 1.5"):
            dataclasses.replace(parse(name), **{field.name: 1.5})


def test_a_block_that_is_not_given_is_32_or_what_fits() -> None:
    blockwise: tuple[Blockwise, ...] = (H2O(), H2O(heavy=10), Streaming(window=5), Cascade(size=7))
    assert [policy.bound + 1 - policy.rest for policy in blockwise] == [32, 10, 5, 7]
    assert dataclasses.replace(H2O(), heavy=20).rest == 20 + 282 + 1 - 20
    assert H2O(heavy=10).sized(1000).rest == 1001 - 32
    for number in (-1, -2, 2**21):
        with pytest.raises(PolicyError, match=f"block={number} is not between"):
            parse(f"streaming(block={number})")


def test_a_block_that_is_given_stays_or_shrinks_with_the_policy() -> None:
    policy = H2O(block=20)
    assert policy.sized(1000).block == 20
    assert policy.sized(30).block == 15
    with pytest.raises(PolicyError, match="block=20 is not between 1 and 15"):
        dataclasses.replace(policy, heavy=15)


def test_a_full_cache_can_have_any_bound() -> None:
    assert Full().sized(300) == Full(bound=100).sized(300) == Full(bound=300)
    assert not Full().evicts
    with pytest.raises(PolicyError, match="full: a bound of 0 entries"):
        Full().sized(0)


@pytest.mark.parametrize("sizes", [(), ("size",)])
def test_a_policy_that_cannot_be_scaled_says_so(sizes: tuple[str, ...]) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Fixed(Streaming):
        size: int = 0

        name = "fixed"

    Fixed.sizes = sizes
    with pytest.raises(PolicyError, match=r"^fixed.* names no sizes that could be scaled to a bound of 100"):
        Fixed().sized(100)


def test_entries_are_quantised_a_block_at_a_time_beside_the_residual() -> None:
    policy = parse("h2o(kivi=4,residual=10)")
    assert [policy.quantised(n, 0) for n in (9, 41, 42, 100)] == [0, 0, 32, 90]
    assert [policy.quantised(n, 32) for n in (42, 73, 74)] == [32, 32, 64]
    assert H2O().quantised(500, 0) == 0


@pytest.mark.parametrize("policy", BOUNDED, ids=lambda policy: policy.name)
def test_what_is_pinned_takes_its_places_from_the_bound(policy: Policy) -> None:
    pinned = dataclasses.replace(policy, pinned=40)
    assert (pinned.bound, pinned.pins, pinned.rule.bound) == (policy.bound, 40, policy.bound - 40)
    assert pinned.rule == policy.sized(policy.bound - 40)
    assert parse(str(pinned)) == pinned
    with pytest.raises(PolicyError, match="pinned=564 leaves 0 of a bound of 564"):
        dataclasses.replace(policy, pinned=policy.bound)


def test_a_system_prompt_pins_nothing_until_it_is_known() -> None:
    policy = parse("buzz2(pinned=system)")
    assert (policy.pins, policy.rule) == (0, policy)
    assert policy.pinning(30) == parse("buzz2(pinned=30)")
    assert policy.pinning(0) == parse("buzz2")
    assert policy.pinning(30).pinning(5).pins == 30


def test_who_evicts_nothing_has_nothing_to_pin() -> None:
    policy = parse("full(bound=100,pinned=200)")
    assert (policy.pins, policy.rule) == (0, policy)
