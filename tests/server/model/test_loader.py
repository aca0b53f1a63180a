"""What is served answers as transformers would; what is not is refused in one sentence."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedConfig

from apiary_server.model.backends import Reference
from apiary_server.model.backends.cpu import Cpu
from apiary_server.model.loader import LoadedModel, UnservableModel, load
from apiary_server.settings import Settings
from apiary_server.worker import build
from tests import tiny
from tests.server.driver import ask, create

SIZES = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
WITHOUT_GROUPS = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}

FULL = {"layer_types": ["full_attention"] * 2, "sliding_window": None}


def rope(kind: str, **parameters: object) -> PreTrainedConfig:
    return tiny.config(rope_parameters={"rope_type": kind, "rope_theta": 10_000.0, **parameters})


SERVED: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": tiny.config,
    "llama, heads wider than hidden / heads": lambda: tiny.config(head_dim=16),
    "llama, one KV head": lambda: tiny.config(num_key_value_heads=1),
    "llama, tied": lambda: tiny.config(tie_word_embeddings=True),
    "llama, padded vocabulary": lambda: tiny.config(vocab_size=320),
    "llama3 rope": lambda: rope(
        "llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=256,
    ),
    "linear rope": lambda: rope("linear", factor=2.0),
    "yarn rope": lambda: rope("yarn", factor=4.0, original_max_position_embeddings=256),
    "mistral": lambda: hf.MistralConfig(**SIZES, sliding_window=None),
    "mixtral": lambda: hf.MixtralConfig(**SIZES, sliding_window=None, num_local_experts=2),
    "qwen2": lambda: hf.Qwen2Config(**SIZES),
    "qwen3": lambda: hf.Qwen3Config(**SIZES, head_dim=16),
    "gemma": lambda: hf.GemmaConfig(**SIZES, head_dim=16),
    "olmo2": lambda: hf.Olmo2Config(**SIZES),
    "granite": lambda: hf.GraniteConfig(**SIZES, attention_multiplier=0.5),
    "phi, partial rotary": lambda: hf.PhiConfig(**SIZES),
    "gpt-neox, partial rotary": lambda: hf.GPTNeoXConfig(**WITHOUT_GROUPS),
}

REFUSED: dict[str, tuple[Callable[[], PreTrainedConfig], str]] = {
    "mistral with a window": (
        lambda: hf.MistralConfig(**SIZES, sliding_window=64),
        "sliding window of 64; only full attention is served",
    ),
    "qwen2 with a window": (
        lambda: hf.Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=64, max_window_layers=1),
        "layers of kind full_attention, sliding_attention",
    ),
    "gemma2": (lambda: hf.Gemma2Config(**SIZES, head_dim=16), "sliding_attention"),
    "gemma2 without windows": (
        lambda: hf.Gemma2Config(
            **SIZES, head_dim=16, layer_types=["full_attention"] * 2, sliding_window=None
        ),
        r"soft-capped attention logits \(attn_logit_softcapping\)",
    ),
    "gpt-oss": (lambda: hf.GptOssConfig(**SIZES, head_dim=8, num_local_experts=4), "sliding_attention"),
    "latent attention": (
        lambda: hf.DeepseekV2Config(**SIZES | {"num_key_value_heads": 4}, n_routed_experts=2),
        r"latent attention \(kv_lora_rank\)",
    ),
    "gpt-2": (
        lambda: hf.GPT2Config(vocab_size=259, n_positions=1024, n_embd=32, n_layer=2, n_head=4),
        "no rotary positions that can be moved",
    ),
    "dynamic rope": (lambda: rope("dynamic", factor=2.0), "of type dynamic, which change with the length"),
    "longrope": (
        lambda: rope(
            "longrope",
            factor=2.0,
            short_factor=[1.0] * 4,
            long_factor=[2.0] * 4,
            original_max_position_embeddings=256,
        ),
        "of type longrope, which change with the length",
    ),
    "interleaved rotation": (lambda: hf.CohereConfig(**SIZES), "does not compose, or not in every layer"),
    "interleaved partial rotation": (
        lambda: hf.GlmConfig(**SIZES, head_dim=8),
        "does not compose, or not in every layer",
    ),
    "layers that do not rotate": (
        lambda: hf.SmolLM3Config(**SIZES | {"num_hidden_layers": 4}, no_rope_layer_interval=4),
        "does not compose, or not in every layer",
    ),
    "attention of its own": (lambda: hf.StableLmConfig(**SIZES), "attention of its own"),
    "alibi": (
        lambda: hf.BloomConfig(vocab_size=259, hidden_size=32, n_layer=2, n_head=4),
        "does not state its trained length",
    ),
    "state space": (
        lambda: hf.MambaConfig(vocab_size=259, hidden_size=32, num_hidden_layers=2),
        "layers of kind linear_attention",
    ),
    "encoder": (
        lambda: hf.BertConfig(
            vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
        ),
        "no rotary positions",
    ),
}


def save(directory: Path, config: PreTrainedConfig) -> Path:
    """Any decoder with random weights, as a Hugging Face directory."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).eval().save_pretrained(directory)
    tiny.tokenizer().save_pretrained(directory)
    return directory


def loaded(path: Path, dtype: torch.dtype = torch.float32) -> LoadedModel:
    return load(path, torch.device("cpu"), dtype, dtype)


def by_own_modules() -> dict[str, Callable[[], PreTrainedConfig]]:
    """Models that are not of the Llama family, and one that only looks so."""
    names = ("mixtral", "olmo2", "phi, partial rotary", "gpt-neox, partial rotary")
    return {name: SERVED[name] for name in names} | {
        "granite, scaled residuals": lambda: hf.GraniteConfig(**SIZES, residual_multiplier=0.5)
    }


def refused(path: Path, why: str) -> None:
    with pytest.raises(UnservableModel, match=why) as refusal:
        loaded(path)
    assert str(path) in refusal.value.message
    assert "\n" not in refusal.value.message
    assert len(refusal.value.message) < len(str(path)) + 450


@pytest.mark.parametrize("name", SERVED)
def test_a_served_model_answers_as_transformers_would(tmp_path: Path, name: str) -> None:
    save(tmp_path, SERVED[name]())
    engine = build(
        Settings.load(
            model=str(tmp_path),
            cache_budget="4MiB",
            workspace_entries=256,
            policy="full(bound=128)",
            threads=1,
        )
    )
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    prompt = [(7 * i) % 250 + 3 for i in range(30)]
    create(engine, "a")
    first = ask(engine, prompt, "a", max_tokens=20).token_ids
    second = ask(engine, prompt[:5], "a", max_tokens=20).token_ids
    for before, answer in ((prompt, first), ([*prompt, *first, *prompt[:5]], second)):
        expected = reference.generate(
            torch.tensor([before]),
            attention_mask=torch.ones(1, len(before), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=20,
            min_new_tokens=20,
            eos_token_id=None,
        )
        assert answer == expected[0, len(before) :].tolist()
    assert len(set(first + second)) > 4, "the random model says too little to compare"


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_served_is_refused(tmp_path: Path, name: str) -> None:
    config, why = REFUSED[name]
    refused(save(tmp_path, config()), why)


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    hf.T5Config(vocab_size=259, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8).save_pretrained(
        tmp_path
    )
    refused(tmp_path, "encoder-decoder model; only decoders")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "qwen3", "phi, partial rotary"])
def test_the_checks_hold_in_half_precision(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    assert loaded(save(tmp_path, SERVED[name]()), dtype).geometry.dtype == dtype
    with pytest.raises(UnservableModel, match="does not compose"):
        loaded(save(tmp_path / "cohere", hf.CohereConfig(**SIZES)), dtype)


@pytest.mark.parametrize("name", ["llama", "llama3 rope", "mistral", "qwen2", "qwen3", "gemma"])
def test_the_llama_family_runs_on_the_fast_backend(tmp_path: Path, name: str) -> None:
    assert isinstance(loaded(save(tmp_path, SERVED[name]())).backend, Cpu)


@pytest.mark.parametrize("name", by_own_modules())
def test_others_run_in_their_own_modules(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, by_own_modules()[name]())
    assert isinstance(loaded(path).backend, Reference)
    with pytest.raises(UnservableModel, match="cannot run on backend cpu with fp32 weights: ") as refusal:
        load(path, torch.device("cpu"), torch.float32, torch.float32, backend="cpu")
    assert "\n" not in refusal.value.message


def test_a_backend_is_taken_by_name(tmp_path: Path) -> None:
    path, cpu, wide = save(tmp_path, tiny.config()), torch.device("cpu"), torch.float32
    assert isinstance(load(path, cpu, wide, wide, backend="reference").backend, Reference)
    assert not load(path, cpu, wide, wide, weights="int8").exact
    with pytest.raises(UnservableModel, match="backend reference keeps weights as they are, and not as int8"):
        load(path, cpu, wide, wide, backend="reference", weights="int8")
    with pytest.raises(UnservableModel, match="computes on a GPU, and not on cpu"):
        load(path, cpu, wide, wide, backend="cuda")
    with pytest.raises(UnservableModel, match="computes in float32"):
        load(path, cpu, torch.bfloat16, torch.bfloat16, backend="cpu")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system does not tell")
@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_the_file_is_let_go(tmp_path: Path, weights: Literal["fp32", "int8"]) -> None:
    """A backend has its own weights, and the memory of the file would come on top of them."""
    path = tiny.save(tmp_path, tiny.config(tie_word_embeddings=True))
    cpu = torch.device("cpu")
    loaded = load(path, cpu, torch.float32, torch.float32, weights=weights)
    gc.collect()
    assert isinstance(loaded.backend, Cpu)
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_what_is_known_of_a_model(tmp_path: Path) -> None:
    model = loaded(save(tmp_path, tiny.config(head_dim=16)))
    assert (model.architecture, model.query_heads) == ("LlamaForCausalLM", 4)
    assert (model.geometry.layers, model.geometry.kv_heads, model.geometry.head_dim) == (2, 2, 16)
    assert (model.rotary.max_positions, model.tokenizer.vocab_size) == (1024, 259)
    assert model.eos_token_ids == (2,)
    assert isinstance(model.backend, Cpu)


# broken directories


def edit(name: str, **fields: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        content = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps(content | fields))

    return change


def weights(change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    def rewrite(directory: Path) -> None:
        path = directory / "model.safetensors"
        changed = {name: change(name, tensor) for name, tensor in load_file(path).items()}
        kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
        save_file(kept, path, metadata={"format": "pt"})

    return rewrite


def write(name: str, content: bytes) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (directory / name).write_bytes(content)

    return change


def without(pattern: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        for path in directory.glob(pattern):
            path.unlink()

    return change


def pickled(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def truncated(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (without("config.json"), "config.json cannot be read"),
    "broken config": (write("config.json", b'{"model_type": "lla'), "config.json cannot be read"),
    "config that is no text": (write("config.json", b"\xff\xfe"), "config.json cannot be read"),
    "config that is a list": (write("config.json", b"[1]"), "Unrecognized model"),
    "unknown architecture": (edit("config.json", model_type="zebra"), "zebra"),
    "mistyped config": (edit("config.json", num_hidden_layers="2"), "num_hidden_layers"),
    "no heads": (edit("config.json", num_attention_heads=0), "cannot be loaded"),
    "unknown rope": (edit("config.json", rope_parameters={"rope_type": "zzz"}), "zzz"),
    "code of its own": (
        edit("config.json", auto_map={"AutoModelForCausalLM": "evil.Model"}),
        r"code of its own \(auto_map in config.json\), which is never run",
    ),
    "tokenizer code of its own": (
        edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}, tokenizer_class="T"),
        "custom code",
    ),
    "pickled weights": (pickled, "no safetensors weights; pickled ones are never loaded"),
    "truncated weights": (truncated, "SafetensorError"),
    "empty weights": (write("model.safetensors", b""), "SafetensorError"),
    "a missing layer": (
        weights(lambda name, tensor: None if "layers.1." in name else tensor),
        "lacks 9 weights or has them in other shapes: model.layers.1",
    ),
    "weights of another shape": (
        weights(lambda name, tensor: tensor[:, :16].contiguous() if "q_proj" in name else tensor),
        "lacks 2 weights or has them in other shapes: model.layers.0.self_attn.q_proj.weight",
    ),
    "weights that are not numbers": (
        weights(lambda name, tensor: tensor * float("nan") if "norm" in name else tensor),
        "logits that are not finite in torch.float32",
    ),
    "a vocabulary that the weights do not have": (edit("config.json", vocab_size=300), "lm_head.weight"),
    "both directions": (edit("config.json", is_causal=False), "attends in a way"),
    "no tokenizer": (without("token*"), "tokenizer"),
    "broken tokenizer": (write("tokenizer.json", b"{"), "cannot be loaded"),
    "shards that are not there": (
        lambda directory: (
            pickled(directory),
            write("model-00001-of-00002.safetensors", b"")(directory),
            write(
                "model.safetensors.index.json",
                b'{"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}',
            )(directory),
        )[0],
        "model-00002-of-00002.safetensors",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_directory_is_refused(tiny_model: Path, tmp_path: Path, name: str) -> None:
    directory = tmp_path / "model"
    shutil.copytree(tiny_model, directory)
    change, why = BROKEN[name]
    change(directory)
    refused(directory, why)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [(2, 1, (2,)), ([2, 0], 1, (2, 0)), (None, 1, (1,)), (None, [1, 2], (1, 2)), (None, None, ())],
)
def test_end_tokens(
    tiny_model: Path, tmp_path: Path, generation: object, config: object, expected: tuple[int, ...]
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(tiny_model, directory)
    edit("generation_config.json", eos_token_id=generation)(directory)
    edit("config.json", eos_token_id=config)(directory)
    assert loaded(directory).eos_token_ids == expected


def test_a_template_that_fails_does_not_keep_the_model_from_loading(tiny_model: Path, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(tiny_model, directory)
    write("chat_template.jinja", b"{% for")(directory)
    assert loaded(directory).tokenizer.chat


def test_padded_embeddings_serve_ids_without_text(tmp_path: Path) -> None:
    """Ids that the model has and the tokenizer has not may be sent and be generated; they have no text."""
    save(tmp_path, tiny.config(vocab_size=320))
    engine = build(
        Settings.load(model=str(tmp_path), cache_budget="8MiB", policy="buzz(threshold=20)", threads=1)
    )
    answers = [ask(engine, [300 + i, 319, 5], max_tokens=60) for i in range(4)]
    assert any(token >= 259 for answer in answers for token in answer.token_ids)
    for answer in answers:
        assert answer.error is None
        assert len(answer.token_ids) == 60
        known = [token for token in answer.token_ids if token < 259]
        assert answer.text.rstrip("\ufffd") == engine.detokenize(known).rstrip("\ufffd")
