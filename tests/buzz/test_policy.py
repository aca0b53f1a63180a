from __future__ import annotations

import dataclasses

import pytest

from buzz import H2O, Buzz, Full, Policy, PolicyError, Streaming

ALL = [Buzz(), Full(bound=100), H2O(), Streaming()]


@pytest.mark.parametrize("policy", ALL, ids=lambda policy: policy.name)
def test_a_policy_is_an_immutable_value(policy: Policy) -> None:
    assert dataclasses.replace(policy) == policy
    assert hash(dataclasses.replace(policy)) == hash(policy)
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.positions = "original"  # type: ignore[misc]
    with pytest.raises(TypeError):
        type(policy)("original")  # settings go by name only


@pytest.mark.parametrize("policy", [Buzz(), H2O(), Streaming()], ids=lambda policy: policy.name)
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
    assert [policy.log_n for policy in ALL] == [None] * 4
    assert Buzz(log_n=512).log_n == 512
