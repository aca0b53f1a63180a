from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buzz import (
    H2O,
    Buzz,
    Compaction,
    Full,
    Policy,
    PolicyError,
    Streaming,
    View,
    names,
    parse,
    register,
    registry,
)
from tests.buzz.strategies import policies


@given(policies)
def test_every_policy_returns_from_its_specification(policy: Policy) -> None:
    assert parse(str(policy)) == policy


@pytest.mark.parametrize(
    ("spec", "policy"),
    [
        ("buzz", Buzz()),
        ("buzz()", Buzz()),
        (" buzz ( window = 300 , stride=3 ) ", Buzz(window=300, stride=3)),
        ("buzz(local_max=False,accumulate=false,log_n=None)", Buzz(local_max=False, accumulate=False)),
        ("buzz(positions=original)", Buzz(positions="original")),
        ("buzz(positions='original')", Buzz(positions="original")),
        ('h2o(positions="in_cache",recent=0)', H2O(recent=0)),
        ("full", Full()),
        ("full(bound=2048)", Full(bound=2048)),
        ("full(bound=none)", Full()),
        ("streaming(sink=0,block=1)", Streaming(sink=0, block=1)),
    ],
)
def test_specifications(spec: str, policy: Policy) -> None:
    assert parse(spec) == policy


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("", "is not a policy; write for example"),
        ("buzz(", "is not a policy"),
        ("buzz)", "is not a policy"),
        ("buzz(window=300))", "is not a policy"),
        ("buzz(window=(300))", "is not a policy"),
        ("buzz(window=int('3'))", "is not a policy"),
        ("buzz window=3", "is not a policy"),
        ("buzz\nfull", "is not a policy"),
        ("Buzz", "is not a policy"),
        ("__import__", "is not a policy"),
        ("ｂuzz", "is not a policy"),
        ("lru", "unknown policy 'lru'; known are buzz, buzz2, cascade, corm, elastic, full"),
        (
            "buzz(heavy=3)",
            "buzz: unknown setting 'heavy'; settings are positions, kivi, residual, pinned, sink,",
        ),
        ("buzz(name=x)", "unknown setting 'name'"),
        ("buzz(300)", "'300' is not setting=value"),
        ("buzz(window=300,)", "'' is not setting=value"),
        ("buzz(,)", "'' is not setting=value"),
        ("buzz(window=)", "is not setting=value"),
        ("buzz(window==3)", "is not setting=value"),
        ("buzz(window=3.5)", "buzz: window=3.5 is not an integer, true, false, none or a word"),
        ("buzz(window=3e2)", "buzz: window=3e2 is not an integer, true, false, none or a word"),
        ("buzz(window=٣)", "buzz: window=٣ is not an integer, true, false, none or a word"),
        ("buzz(window=0x10)", "buzz: window=0x10 is not an integer, true, false, none or a word"),
        ("buzz(window=3 4)", "is not setting=value"),
        ("buzz(positions='original\")", "positions='original\" is not an integer"),
        ("buzz(window=3,window=3)", "window is set twice"),
        ("buzz(window='three')", "window must be an integer, not 'three'"),
        ("buzz(window=true)", "window must be an integer, not True"),
        ("buzz(window=none)", "window must be an integer, not None"),
        ("buzz(local_max=1)", "local_max must be true or false, not 1"),
        ("buzz(positions=0)", "positions must be in_cache or original, not 0"),
        ("buzz(window=-1)", "window=-1 is not between 0 and"),
        ("buzz(window=" + "9" * 200 + ")", "is not between 0 and"),
        ("buzz(stride=2)", "stride=2 is less than 3"),
        ("full(bound=0)", "a bound of 0 entries"),
        ("buzz" + " " * 300, "at most 256 characters, not 304"),
    ],
)
def test_what_is_wrong_is_said(spec: str, reason: str) -> None:
    with pytest.raises(PolicyError) as error:
        parse(spec)
    assert reason in str(error.value)
    assert len(str(error.value)) < 700


@given(st.text(alphabet="buzfl(=,)0-9'\" \n_truenx", max_size=40) | st.text(max_size=300))
def test_any_text_is_a_policy_or_a_policy_error(text: str) -> None:
    try:
        policy = parse(text)
    except PolicyError:
        return
    assert policy.name in names()


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_policies", dict(registry._policies))


@dataclass(frozen=True, kw_only=True)
class Newest(Policy):
    """The most recent entries only."""

    window: int = 564

    name: ClassVar[str] = "newest"
    sizes: ClassVar[tuple[str, ...]] = ("window",)

    @property
    def bound(self) -> int:
        return self.window

    def due(self, n: int, sampled: int) -> bool:
        return n > self.window

    def compact(self, view: View) -> Compaction:
        return Compaction(view.span(view.n - self.window, view.n))


def other(name: str | None) -> type[Newest]:
    return dataclass(frozen=True, kw_only=True)(type("Other", (Newest,), {"name": name}))


@pytest.mark.usefixtures("known")
def test_a_policy_of_ones_own() -> None:
    assert register(Newest) is Newest
    assert register(Newest) is Newest  # again is harmless
    assert parse("newest(window=100)") == Newest(window=100)
    assert "newest" in names()


@pytest.mark.usefixtures("known")
def test_a_class_that_is_defined_again_takes_the_place_of_the_former() -> None:
    def define(default: int) -> type[Newest]:
        @register
        @dataclass(frozen=True, kw_only=True)
        class Again(Newest):
            window: int = default

            name = "again"

        return Again

    first, second = define(7), define(8)
    assert first is not second
    assert type(parse("again")) is second
    assert parse("again").bound == 8
    with pytest.raises(PolicyError, match=r"'again' is taken by .*Again"):
        register(other("again"))


@pytest.mark.usefixtures("known")
def test_what_is_no_policy_cannot_be_registered() -> None:
    for wrong in (object, Newest(), Policy):
        with pytest.raises(PolicyError):
            register(wrong)  # type: ignore[type-var]
    for name, reason in (
        ("buzz", "is taken by Buzz"),
        ("No Name", "needs a name of"),
        (None, "needs a name of"),
    ):
        with pytest.raises(PolicyError, match=reason):
            register(other(name))


@pytest.mark.usefixtures("known")
def test_what_is_no_whole_dataclass_cannot_be_registered() -> None:
    class Forgot(Newest):
        budget: int = 3

        name = "forgot"

    @dataclass(frozen=True, kw_only=True)
    class Lacks(Newest):
        budget: int

        name = "lacks"

    with pytest.raises(PolicyError, match=r"Forgot needs @dataclass\(frozen=True, kw_only=True\)"):
        register(Forgot)
    with pytest.raises(PolicyError, match="Lacks: settings need defaults, and budget has none"):
        register(Lacks)
    assert not {"forgot", "lacks"} & set(names())
