"""What buzz/README.md shows works as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import buzz
from buzz import Buffers, Policy, names, parse, registry
from tests.buzz.driver import Driver, Shape, segments

README = (Path(buzz.__file__).parent / "README.md").read_text(encoding="utf-8")
BLOCKS = dict(
    re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?```python\n(.*?)```", README, re.DOTALL | re.MULTILINE)
)
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_policies", dict(registry._policies))


def run(source: str) -> dict[str, object]:
    # dataclasses look their module up, so the names are those of one that exists
    scope: dict[str, object] = {"__name__": __name__}
    exec(compile(source, "README.md", "exec", dont_inherit=True), scope)
    return scope


def test_every_block_of_the_readme_is_tested_here() -> None:
    assert README.count("```python") == len(BLOCKS)
    assert BLOCKS.keys() == {"With transformers", "With your own attention", "A policy of your own"}


def test_the_table_has_every_policy_as_it_is_by_default() -> None:
    listed = re.findall(r"^\| `([^`]+)` \|", README, re.MULTILINE)
    assert sorted(parse(spec).name for spec in listed) == list(names())
    assert [str(parse(spec)) for spec in listed] == listed
    assert [str(parse(parse(spec).name)) for spec in listed] == listed


def test_with_your_own_attention(capsys: pytest.CaptureFixture[str]) -> None:
    cache = run(BLOCKS["With your own attention"])["cache"]
    assert isinstance(cache, buzz.Cache)
    assert (cache.n, cache.evicted, cache.seen) == (353, 549, 902)
    assert capsys.readouterr().out.startswith("353 549 tensor([[")


def resting(policy: Policy, head_dim: int, dtype: torch.dtype) -> Buffers:
    """What it says that a quantised session rests in."""
    assert "capacity=policy.bound + 1" in README
    assert "packed=policy.bound - policy.residual, dense=policy.residual + 32" in README
    return Buffers.empty(
        layers=1,
        kv_heads=2,
        capacity=policy.bound + 1,
        head_dim=head_dim,
        dtype=dtype,
        device="cpu",
        states=policy.states,
        bits=policy.kivi,
        packed=policy.bound - policy.residual,
        dense=policy.residual + 32,
    )


def test_quantised_sessions_rest_where_it_says() -> None:
    policy = parse("h2o(heavy=30,recent=40,block=3,kivi=4,residual=8)")
    driver = Driver(policy, Shape(head_dim=32), seed=3, slot=True)  # with a workspace of packed=0
    rest, packed = resting(policy, 32, torch.float64), 0
    for cuts in segments(seed=4, steps=200):
        alone = cuts == [1] and driver.cache.buffers is rest
        driver.slot = None if alone else rest
        driver.segment(cuts)
        assert driver.cache.buffers is rest
        packed = max(packed, driver.cache.packed)
    assert driver.cache.evicted > 50
    assert packed > 50


def test_what_quantised_sessions_take_is_as_it_says() -> None:
    memory = resting(parse("h2o(kivi=4)"), 64, torch.float32)
    assert memory.packed is not None
    codes = memory.packed.tensors[:-1]
    assert sum(tensor[0, 0, 0].nbytes for tensor in codes) == 80
    entries = sum(tensor[0, 0].nbytes for tensor in (memory.keys, memory.values, *codes))
    assert entries == 436 * 80 + 160 * 512 == 116_800
    assert "436 entries of 80 bytes and 160 of 512 a KV head and layer, 117 KB" in README


@pytest.mark.usefixtures("known")
def test_a_policy_of_your_own() -> None:
    source = BLOCKS["A policy of your own"]
    policy_class = source[source.index("@register") :]
    assert policy_class.count("\n") < 30
    assert "tova" not in names()
    run(source)
    policy = parse("tova(budget=32,positions=original)")
    assert parse(str(policy)) == policy
    assert policy.sized(100).bound == 100
    driver = Driver(policy, Shape(max_positions=200), seed=1)
    for cuts in segments(seed=2, steps=100):
        if driver.segment(cuts):
            assert driver.cache.n == 30
        assert driver.cache.n <= 32
    assert driver.cache.evicted > 100


@pytest.mark.model
@pytest.mark.usefixtures("known")
def test_with_transformers(default_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = BLOCKS["With transformers"]
    assert HUB in source
    scope = run(source.replace(HUB, str(default_model)).replace("max_new_tokens=100", "max_new_tokens=3"))
    cache = scope["cache"]
    assert len(cache.rows) == 1  # type: ignore[attr-defined]
    assert "Name the planets." in capsys.readouterr().out
