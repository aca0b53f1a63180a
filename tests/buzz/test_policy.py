from __future__ import annotations

import dataclasses

import pytest

from buzz import H2O, Buzz, Cascade, Full, Policy, PolicyError, Streaming, names, parse

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
    assert str(H2O()) == "h2o(heavy=282,recent=282,block=32)"
    assert str(Streaming()) == "streaming(sink=4,window=560,block=32)"


def test_only_buzz_scales_logits() -> None:
    assert {policy.log_n for policy in ALL} == {None}
    assert Buzz(log_n=512).log_n == 512


@pytest.mark.parametrize("policy", BOUNDED, ids=lambda policy: policy.name)
def test_defaults_hold_as_much_as_the_papers_buzz(policy: Policy) -> None:
    assert policy.bound == 564
    assert policy.evicts


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
    assert (H2O().block, H2O(heavy=10).block, H2O(heavy=10, block=-1).block) == (32, 10, 10)
    assert (Streaming(window=5).block, Cascade(size=7).block) == (5, 7)
    with pytest.raises(PolicyError, match="window must be an integer, not 'three'"):
        parse("streaming(window=three)")
    with pytest.raises(PolicyError, match="block=-2 is not between"):
        Streaming(block=-2)
