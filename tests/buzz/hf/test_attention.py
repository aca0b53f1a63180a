from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LlamaConfig,
    PreTrainedModel,
)

from buzz import Buffers, Cache, Rotary, parse
from buzz.hf import BuzzCache
from tests.buzz.hf.models import (
    LENGTH,
    OTHERS,
    PROMPTS,
    SMALL,
    batch_of,
    generate,
    kept,
    logits,
    model_of,
    padded,
    sized,
    tokens,
)


@pytest.mark.parametrize("spec", SMALL + OTHERS)
def test_in_cache_positions_are_those_of_the_kept_tokens_alone(spec: str) -> None:
    """With one layer and head keys depend on their tokens alone, so attention over a cache must be the plain
    model over the kept tokens."""
    model = model_of(sized(LlamaConfig, num_hidden_layers=1, num_key_value_heads=1))
    cache, ids = BuzzCache(model, spec), tokens(1, 90)
    logits(model, ids[:, :15], cache)
    for at in range(15, 90):
        before = kept(cache).flatten().long()
        step = logits(model, ids[:, at : at + 1], cache)[0, -1]
        alone = logits(model, torch.cat([ids[:, before], ids[:, at : at + 1]], dim=1))[0, -1]
        torch.testing.assert_close(step, alone, atol=1e-4, rtol=0)
    assert cache.rows[0].evicted > 60


def test_original_positions_are_the_plain_model_under_a_mask(llama: PreTrainedModel) -> None:
    policy = parse("streaming(sink=2,window=16,block=4,positions=original)")
    cache, ids = BuzzCache(llama, policy), tokens(1, LENGTH)
    driven = Cache(policy, Rotary.of(8, LENGTH), Buffers.empty(1, 1, 64, 8, torch.float32, "cpu"))
    seen = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    steps = []
    for count in [24] + [1] * 40:
        start = driven.seen
        before = driven.buffers.position[0, 0, : driven.n].long()
        driven.begin_segment(count)
        driven.prepare(count)
        driven.append(count)
        driven.end_segment()
        seen[start : start + count, before] = True
        seen[start : start + count, start : start + count] = torch.ones(count, count).tril().bool()
        steps.append(logits(llama, ids[:, start : start + count], cache))
        assert (kept(cache) == driven.buffers.position[:, :, : driven.n]).all()
    assert driven.evicted == LENGTH - driven.n > 40
    expected = logits(llama, ids, attention_mask=seen[None, None])
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("far", [1000, 100_000])
def test_how_far_the_model_counted_does_not_matter(llama: PreTrainedModel, far: int) -> None:
    near, distant, ids = BuzzCache(llama, SMALL[2]), BuzzCache(llama, SMALL[2]), tokens(1, 60)
    for at in range(0, 60, 10):
        place = torch.arange(at, at + 10)[None]
        expected = logits(llama, ids[:, at : at + 10], near, position_ids=place)
        moved = logits(llama, ids[:, at : at + 10], distant, position_ids=place + far)
        # float32 angles: the model's own rounding grows with the position
        torch.testing.assert_close(moved, expected, atol=3e-6 * far, rtol=0)


def test_the_model_is_as_before_without_the_cache(model: PreTrainedModel) -> None:
    fresh = copy.deepcopy(model)
    fresh.set_attn_implementation("sdpa")
    batch = padded(PROMPTS)
    expected, generated = logits(fresh, **batch_of(batch)), generate(fresh, batch, None, 10)
    generate(model, batch, BuzzCache(model, SMALL[0]), 10)
    assert model.config._attn_implementation == "buzz|sdpa"
    assert logits(model, **batch_of(batch)).equal(expected)
    assert generate(model, batch, None, 10).equal(generated)
    assert generate(model, batch, DynamicCache(), 10).equal(generated)


def test_eager_attention_stays_eager() -> None:
    config = sized(LlamaConfig)
    model, fresh = model_of(config, "eager"), model_of(copy.deepcopy(config), "eager")
    ids = generate(model, padded(PROMPTS), BuzzCache(model, "full"), 20)
    assert ids.equal(generate(fresh, padded(PROMPTS), None, 20))
    assert model.config._attn_implementation == "buzz|eager"
    with torch.no_grad():
        mine = model(PROMPTS[1][None], output_attentions=True)
        theirs = fresh(PROMPTS[1][None], output_attentions=True)
    assert mine.logits.equal(theirs.logits)
    assert [a.equal(b) for a, b in zip(mine.attentions, theirs.attentions, strict=True)] == [True] * 2


def test_caches_in_turn_and_in_threads_do_not_meet(llama: PreTrainedModel) -> None:
    expected = [generate(llama, prompt[None], BuzzCache(llama, SMALL[0]), 25)[0] for prompt in PROMPTS]
    plain = generate(llama, PROMPTS[1][None], None, 25)
    caches = [BuzzCache(llama, SMALL[0]) for _ in PROMPTS]
    rows = list(PROMPTS)
    for _ in range(25):
        for index, cache in enumerate(caches):
            new = rows[index][cache.get_seq_length() :]
            chosen = logits(llama, new[None], cache)[0, -1].argmax()
            rows[index] = torch.cat([rows[index], chosen[None]])
            logits(llama, new[None])
    assert [a.equal(b) for a, b in zip(rows, expected, strict=True)] == [True] * 3

    outcomes: dict[int, Tensor] = {}

    def work(index: int) -> None:
        cache = BuzzCache(llama, SMALL[0]) if index < 3 else None
        outcomes[index] = generate(llama, PROMPTS[index % 3 if cache else 1][None], cache, 25)[0]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [outcomes[index].equal(expected[index]) for index in range(3)] == [True] * 3
    assert outcomes[3].equal(plain[0])
