from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    SmolLM3Config,
    T5Config,
    T5ForConditionalGeneration,
)

from buzz import Full, PolicyError
from buzz.hf import BuzzCache, UnsupportedError
from tests.buzz.hf.models import SMALL, logits, model_of, sized, tokens


def dynamic() -> Any:
    return sized(LlamaConfig, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (lambda: sized(GPT2Config), "has no rotary positions"),
        (
            lambda: sized(MistralConfig, sliding_window=8),
            r"up to 8 tokens .* from_pretrained\(..., sliding_window=None\)",
        ),
        (lambda: sized(Gemma2Config, head_dim=8), "layers of full_attention, sliding_attention"),
        (lambda: sized(CohereConfig), "rotates in a way that is not served"),  # interleaved
        (lambda: sized(SmolLM3Config, num_hidden_layers=4), "rotates in a way that is not served"),  # NoPE
        (dynamic, "positions of type dynamic"),
    ],
    ids=["gpt2", "mistral", "gemma2", "cohere", "smollm3", "dynamic"],
)
def test_models_that_are_not_served_are_refused_and_left_alone(
    config: Callable[[], Any], reason: str
) -> None:
    model = model_of(config(), "eager")
    before = logits(model, tokens(1, 9))
    with pytest.raises(UnsupportedError, match=reason):
        BuzzCache(model, SMALL[0])
    assert model.config._attn_implementation == "eager"
    assert logits(model, tokens(1, 9)).equal(before)


def test_a_model_with_a_window_is_served_as_the_refusal_says(tmp_path: Path) -> None:
    model = model_of(sized(MistralConfig, sliding_window=8))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, sliding_window=None)
    cache, ids = BuzzCache(loaded, "full"), tokens(1, 12)
    mine, own = logits(loaded, ids, cache), logits(model, ids)
    torch.testing.assert_close(mine[:, :8], own[:, :8], atol=1e-4, rtol=0)
    assert not torch.allclose(mine[:, 8:], own[:, 8:], atol=1e-2)


def test_what_is_no_decoder_at_rest_is_refused(llama: PreTrainedModel) -> None:
    small = T5Config(vocab_size=61, d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8)
    with pytest.raises(UnsupportedError, match="not a plain decoder"):
        BuzzCache(T5ForConditionalGeneration(small), "buzz")
    with pytest.raises(UnsupportedError, match="not Linear; pass the model itself"):
        BuzzCache(torch.nn.Linear(2, 2), "buzz")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match=r"not OptimizedModule; .* without torch.compile"):
        BuzzCache(torch.compile(llama), "buzz")
    with pytest.raises(UnsupportedError, match="is in training mode"):
        BuzzCache(copy.deepcopy(llama).train(), "streaming(sink=1,window=8)")
    flexible = copy.deepcopy(llama)
    flexible.set_attn_implementation("flex_attention")
    with pytest.raises(UnsupportedError, match="set_attn_implementation"):
        BuzzCache(flexible, SMALL[0])
    for spec, reason in (("buzz(", "is not a policy"), ("streaming(sink=4,window=60)", "must be less")):
        with pytest.raises(PolicyError, match=reason):
            BuzzCache(llama, spec)


def test_a_model_is_not_taken_for_served_while_it_is_checked() -> None:
    model, met = model_of(sized(CohereConfig)), []

    def meanwhile(*_: Any) -> None:
        if not met:
            met.append(model)
            with pytest.raises(UnsupportedError, match="rotates in a way that is not served"):
                BuzzCache(model, SMALL[0])

    model.register_forward_pre_hook(meanwhile)
    with pytest.raises(UnsupportedError, match="rotates in a way that is not served"):
        BuzzCache(model, SMALL[0])
    assert met
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("wrong", [None, 42, b"buzz", [SMALL[0]], Full])
def test_what_is_no_policy_is_refused(llama: PreTrainedModel, wrong: Any) -> None:
    with pytest.raises(
        PolicyError, match=r"a policy, or a specification such as 'h2o\(heavy=100\)', is needed"
    ):
        BuzzCache(llama, wrong)


def test_a_model_without_its_head_is_served(llama: PreTrainedModel) -> None:
    bare = copy.deepcopy(llama).model
    cache, whole = BuzzCache(bare, SMALL[0]), BuzzCache(llama, SMALL[0])
    for count in (30, 1, 1):
        ids = tokens(1, count, seed=count)
        with torch.no_grad():
            hidden = bare(ids, past_key_values=cache).last_hidden_state
        assert llama.lm_head(hidden).equal(logits(llama, ids, whole))
    assert cache.rows[0].evicted > 0
