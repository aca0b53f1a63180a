"""Policies together, over one trunk, against each policy alone in the worker's own runner."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import buzz
from apiary_bench.quality.bench import Bench
from apiary_bench.quality.ensemble import Ensemble
from apiary_server.model.attention import Batch, ChunkRun
from apiary_server.model.loader import LoadedModel
from buzz import Buffers, Cache, Policy

SPECS = (
    *(str(buzz.parse(name).sized(100)) for name in buzz.names() if name != "full"),
    "buzz(sink=2,window=20,threshold=60,accumulate=false)",
    "buzz(sink=2,window=20,threshold=60,log_n=32)",
    "h2o(heavy=200,recent=200)",  # leaves the trunk late
    "h2o(heavy=50,recent=50,positions=original)",
    "streaming(sink=4,window=100,kivi=4,residual=32)",
)
PROMPT = [3 + (i * i * 7 + i) % 250 for i in range(180)]
MORE = [3 + (i * 31 + 5) % 250 for i in range(60)]


class Alone:
    """One policy's session: the model over one cache, nothing shared."""

    def __init__(self, loaded: LoadedModel, policy: Policy) -> None:
        shape, bits = loaded.geometry, policy.kivi
        self.loaded = loaded
        sizes = (shape.layers, shape.kv_heads, 700, shape.head_dim)
        memory = Buffers.empty(*sizes, shape.dtype, "cpu", policy.states, bits, 0 if bits is None else 300)
        self.cache = Cache(policy, loaded.rotary, memory)

    @torch.inference_mode()
    def feed(self, tokens: Sequence[int]) -> Tensor:
        cache, count = self.cache, len(tokens)
        cache.begin_segment(count)
        positions = torch.tensor(cache.next_positions(count))
        cache.prepare(count)
        policy = cache.policy
        run = ChunkRun(slice(0, count), cache.live, cache.n, cache.seen, policy.states, policy.log_n)
        every = torch.arange(count)
        logits = self.loaded.backend.forward(torch.tensor(tokens), positions, every, Batch(chunks=[run]))
        cache.append(count)
        cache.end_segment()
        return logits


@pytest.fixture
def together(bench: Callable[..., Bench]) -> Bench:
    return bench(*SPECS)


def same_caches(ensemble: Ensemble, alone: list[Alone]) -> None:
    for ours, theirs in zip(ensemble.caches, (each.cache for each in alone), strict=True):
        assert ours.state() == theirs.state(), ours.policy
        mine, other = (cache.buffers.position[:, :, : cache.n] for cache in (ours, theirs))
        assert torch.equal(mine, other), ours.policy


def tolerance(single: Alone) -> float:
    """Of logits: sums are taken in another order, and a value near the middle of two codes may get either."""
    return 1e-4 if single.cache.policy.kivi is None else 0.05


def test_a_prompt_and_tokens_of_its_own(together: Bench) -> None:
    policies = together.policies
    ensemble = Ensemble(together.loaded, policies, len(PROMPT) + 60)
    alone = [Alone(together.loaded, policy) for policy in policies]
    behind = ensemble.read(PROMPT, at=[0, len(PROMPT) - 1])
    ensemble.resize(policies, 1)
    ensemble.end(leave=True)
    for mine, single in zip(behind, alone, strict=True):
        torch.testing.assert_close(mine, single.feed(PROMPT)[[0, -1]], atol=tolerance(single), rtol=0)
    same_caches(ensemble, alone)
    for step in range(50):
        tokens = {i: 3 + (step * 17 + i * 5) % 250 for i in range(len(policies)) if (i + step) % 9}
        logits = ensemble.step(tokens)
        for row, (i, token) in zip(logits, tokens.items(), strict=True):
            torch.testing.assert_close(row, alone[i].feed([token])[0], atol=tolerance(alone[i]), rtol=0)
    same_caches(ensemble, alone)
    assert all(single.cache.evicted for single in alone if single.cache.policy.bound < 150)


def test_running_text(together: Bench) -> None:
    policies = together.policies
    text = (PROMPT + MORE) * 2
    ensemble = Ensemble(together.loaded, policies, len(text))
    ensemble.resize(policies, 16)
    alone = [Alone(together.loaded, policy) for policy in policies]
    for start in range(0, len(text), 16):
        chunk = text[start : start + 16]
        behind = ensemble.read(chunk, at=range(len(chunk)))
        for mine, single in zip(behind, alone, strict=True):
            torch.testing.assert_close(mine, single.feed(chunk), atol=tolerance(single), rtol=0)
        ensemble.end()
    same_caches(ensemble, alone)


def test_looking_ahead_leaves_no_trace(together: Bench) -> None:
    policies = together.policies
    seen, unseen = (Ensemble(together.loaded, policies, len(PROMPT) + 60) for _ in range(2))
    for ensemble in (seen, unseen):
        ensemble.read(PROMPT)
        ensemble.resize(policies, 40)
        ensemble.end(leave=True)
    looked = seen.look([MORE[:5], [], MORE[5:9]])
    ahead = [
        seen.step(dict.fromkeys(range(len(policies)), token), ahead=i) for i, token in enumerate(MORE[:5])
    ]
    for i, texts in enumerate(looked):
        assert [len(text) for text in texts] == [5, 0, 4]
        torch.testing.assert_close(texts[0], torch.stack([row[i] for row in ahead]), atol=1e-4, rtol=0)
    for token in MORE[:30]:
        tokens = dict.fromkeys(range(len(policies)), token)
        torch.testing.assert_close(seen.step(tokens), unseen.step(tokens), atol=1e-5, rtol=0)


def test_what_makes_no_sense_is_refused(bench: Callable[..., Bench]) -> None:
    ours = bench("h2o(heavy=50,recent=50)")
    full, h2o = ours.policies
    with pytest.raises(ValueError, match="live in one trunk"):
        Ensemble(ours.loaded, [full, full], 10)
    ensemble = Ensemble(ours.loaded, [full, h2o], 400)
    ensemble.read(PROMPT)
    with pytest.raises(ValueError, match="still shares"):
        ensemble.step({1: 5})
    with pytest.raises(ValueError, match="before `resize`"):
        ensemble.end()
    ensemble.resize([full, h2o], 1)
    ensemble.end()
    with pytest.raises(ValueError, match="cannot change"):
        ensemble.resize([full, h2o], 1)
