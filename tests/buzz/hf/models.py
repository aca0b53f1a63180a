"""Small models of several architectures, and what the tests do with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from buzz.hf import BuzzCache

CONFIGS = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma": GemmaConfig,
}
OWN: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen3": {"head_dim": 12},
    "gemma": {"head_dim": 16, "num_key_value_heads": 1},
}
LENGTH = 64
SMALL = (
    "buzz(sink=2,window=8,threshold=12,stride=4)",
    "h2o(heavy=8,recent=10,block=3)",
    "streaming(sink=2,window=16,block=4)",
)
OTHERS = (
    "window(window=18,block=4)",
    "corm(budget=18,recent=6,queries=8,block=3)",
    "cascade(sink=2,cascades=2,size=8,block=3)",
)
MERGING = "elastic(sink=2,heavy=12,recent=2,distance=4,block=3)"
ORIGINAL = "h2o(heavy=8,recent=10,block=3,positions=original)"
QUANTISED = (
    "h2o(heavy=24,recent=24,block=3,kivi=4,residual=4)",
    "streaming(sink=2,window=46,block=4,positions=original,kivi=2,residual=0)",
)


def sized(config: Callable[..., Any], **own: Any) -> Any:
    sizes = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": LENGTH,
        "initializer_range": 0.4,  # large enough that what attention does shows in the tokens
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return config(**sizes | own)


def model_of(config: Any, attention: str = "sdpa") -> PreTrainedModel:
    torch.manual_seed(11)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 61, shape, generator=torch.Generator().manual_seed(seed))


PROMPTS = [tokens(count, seed=count) for count in (5, 19, 33)]


def padded(prompts: Sequence[Tensor]) -> dict[str, Tensor]:
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.stack([torch.cat([prompt.new_zeros(longest - len(prompt)), prompt]) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def batch_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def generate(
    model: PreTrainedModel, ids: Tensor | dict[str, Tensor], cache: Any, new: int, **how: Any
) -> Any:
    inputs = ids if isinstance(ids, dict) else {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return model.generate(**inputs, past_key_values=cache, max_new_tokens=new, **{"do_sample": False, **how})


def logits(model: PreTrainedModel, ids: Tensor, cache: Any = None, **how: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=cache is not None, **how).logits


def kept(cache: BuzzCache, row: int = 0) -> Tensor:
    held = cache.rows[row]
    return held.buffers.position[:, :, : held.n]
