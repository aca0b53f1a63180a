from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from apiary_server.model.attention import Batch, ChunkRun, DecodeRun
from apiary_server.model.backends.reference import NAME, Reference
from apiary_server.model.decoder import Decoder, ForeignStructure
from apiary_server.model.operations import Operations
from buzz import Buffers
from tests.server.model.test_loader import SIZES

FAMILY: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: hf.LlamaConfig(**SIZES),
    "llama, biases": lambda: hf.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama, tied": lambda: hf.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": lambda: hf.MistralConfig(**SIZES, sliding_window=None, head_dim=16),
    "qwen2": lambda: hf.Qwen2Config(**SIZES),
    "qwen3": lambda: hf.Qwen3Config(**SIZES, head_dim=16),
    "gemma": lambda: hf.GemmaConfig(**SIZES, head_dim=16),
}
TOKENS = [(7 * i) % 250 + 3 for i in range(24)]


def model_of(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """With random weights everywhere: norms and biases, too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().to(dtype)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5, 0.2)
    model.set_attn_implementation(NAME)
    return model


def logits_of(forward: Callable[[Tensor, Tensor, Tensor, Batch], Tensor], config: PreTrainedConfig) -> Tensor:
    """A prompt in one chunk and one more token, which decodes."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    memory = Buffers.empty(2, 2, 64, head_dim, torch.float32, "cpu")
    last = len(TOKENS) - 1
    places = torch.arange(len(TOKENS))
    chunk = Batch(chunks=[ChunkRun(slice(0, last), memory, 0, 0, (), None)])
    with torch.inference_mode():
        first = forward(torch.tensor(TOKENS[:last]), places[:last], places[:last], chunk)
        many = Buffers(memory.keys[None], memory.values[None], memory.position[None], {})
        count = torch.tensor([last])
        run = DecodeRun(slice(0, 1), many, count, count, last + 1, (), None)
        second = forward(torch.tensor(TOKENS[last:]), places[last:], places[:1], Batch(decodes=[run]))
    return torch.cat([first, second])


@pytest.mark.parametrize("name", FAMILY)
def test_it_computes_what_the_models_own_modules_do(name: str) -> None:
    config = FAMILY[name]()
    model = model_of(config)
    ours = logits_of(Decoder.of(model, Operations()).forward, config)
    theirs = logits_of(Reference(model).forward, config)
    assert ours.shape == (len(TOKENS), config.vocab_size)
    assert torch.allclose(ours, theirs, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize(
    "config",
    [
        hf.Olmo2Config(**SIZES),
        hf.MixtralConfig(**SIZES, sliding_window=None, num_local_experts=2),
        hf.PhiConfig(**SIZES),
        hf.GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4),
    ],
    ids=["other norms", "experts", "other names", "other family"],
)
def test_another_structure_is_told(config: PreTrainedConfig) -> None:
    with pytest.raises(ForeignStructure, match=r"(it has|layers have) "):
        Decoder.of(AutoModelForCausalLM.from_config(config), Operations())


def test_another_norm_is_told() -> None:
    model: Any = model_of(FAMILY["llama"]())
    model.model.norm = nn.LayerNorm(model.config.hidden_size)
    with pytest.raises(ForeignStructure, match="LayerNorm is another kind of normalisation"):
        Decoder.of(model, Operations())
