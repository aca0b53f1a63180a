"""Loads a model for serving, or refuses it in one clear sentence."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from apiary_server.errors import ApiaryError
from apiary_server.model import attention
from apiary_server.model.runner import Piece, Runner
from apiary_server.model.tokenizer import Tokenizer
from apiary_server.sessions.pool import Geometry, Lease, SlotClass, SlotLayout
from buzz import Cache, Rotary
from buzz.policies.full import Full

# what our attention leaves out, by the configuration field that asks for it
_UNSERVED = {
    "attn_logit_softcapping": "soft-capped attention logits",
    "attention_chunk_size": "chunked attention",
    "num_kv_shared_layers": "layers that share keys and values",
    "kv_lora_rank": "latent attention",
    "alibi": "ALiBi positions",
}


class UnservableModel(ApiaryError):
    """A model that this worker cannot serve; the message is one sentence that says why."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready for `Runner`."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    rotary: Rotary
    geometry: Geometry
    architecture: str
    query_heads: int
    eos_token_ids: tuple[int, ...]


def load(path: Path, device: torch.device, dtype: torch.dtype, cache_dtype: torch.dtype) -> LoadedModel:
    """Load a Hugging Face directory.

    Raises:
        UnservableModel: the files are not a model, or not one whose layers this worker can serve.
    """
    logging.disable_progress_bar()
    if "auto_map" in _read_json(path / "config.json"):
        raise UnservableModel(f"{path} needs code of its own (auto_map in config.json), which is never run")
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        _check_config(path, config)
        model = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation=attention.NAME,
            local_files_only=True,
            use_safetensors=True,
        )
        backend = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnservableModel(f"{path} cannot be loaded: {reason}") from error
    if not getattr(backend, "is_fast", False):
        raise UnservableModel(f"{path} has no tokenizer.json (a fast tokenizer), which streaming needs")
    model.to(device)  # type: ignore[arg-type]  # transformers' own annotation takes the model for the device
    model.eval()
    rotary = _rotary(path, model, config)
    heads = config.num_attention_heads
    geometry = Geometry(
        layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        dtype=cache_dtype,
    )
    loaded = LoadedModel(
        model=model,
        tokenizer=Tokenizer(backend, config.vocab_size),
        rotary=rotary,
        geometry=geometry,
        architecture=type(model).__name__,
        query_heads=heads,
        eos_token_ids=_eos(model, config),
    )
    _check_forward(path, loaded)
    return loaded


def _check_config(path: Path, config: PretrainedConfig) -> None:
    """Refuse what the configuration already shows."""
    if config.is_encoder_decoder:
        raise UnservableModel(f"{path} is an encoder-decoder model; only decoders are served")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise UnservableModel(
            f"{path} has layers of kind {', '.join(sorted(kinds))}; only full attention is served"
        )
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True):
        raise UnservableModel(
            f"{path} attends through a sliding window of {window}; only full attention is served"
        )
    for field, what in _UNSERVED.items():
        if getattr(config, field, None):
            raise UnservableModel(f"{path} uses {what} ({field}), which is not served")
    if not getattr(config, "max_position_embeddings", None):
        raise UnservableModel(f"{path} does not state its trained length (max_position_embeddings)")


def _rotary(path: Path, model: PreTrainedModel, config: PretrainedConfig) -> Rotary:
    """The model's rotary embedding, checked: rotations by the model itself must compose with ours."""
    embedding = getattr(model.base_model, "rotary_emb", None)
    inv_freq = getattr(embedding, "inv_freq", None)
    apply = getattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb", None)
    if embedding is None or inv_freq is None or apply is None:
        raise UnservableModel(f"{path} has no rotary positions that can be moved")
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind in {"dynamic", "longrope"}:
        raise UnservableModel(f"{path} has rotary positions of type {kind}, which change with the length")
    rotary = Rotary(inv_freq.detach().clone(), config.max_position_embeddings)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    key = torch.randn(
        1, 1, 3, head_dim, device=model.device, generator=torch.Generator(model.device).manual_seed(0)
    )
    here, there = torch.tensor([[0, 5, 100]]), torch.tensor([[7, 0, 450]])
    with torch.inference_mode():
        at_here = apply(key, key, *embedding(key, here.to(model.device)))[1]
        at_there = apply(key, key, *embedding(key, there.to(model.device)))[1]
    moved = rotary.rotate(at_here[0], (there - here).to(model.device))
    if moved.shape != at_there[0].shape or not torch.allclose(moved, at_there[0], atol=1e-3):
        raise UnservableModel(
            f"{path} rotates positions in a way that does not compose, so survivors cannot move"
        )
    return rotary


def _check_forward(path: Path, loaded: LoadedModel) -> None:
    """Compare a few tokens over our cache, as a chunk and one by one, with the model's own attention. This
    catches whatever in a model's attention no configuration field tells."""
    model, last = loaded.model, min(9, loaded.tokenizer.vocab_size)
    tokens = list(range(1, last))
    layout = SlotLayout(loaded.geometry, len(tokens), scored=False)
    slots = SlotClass(layout, torch.zeros(layout.bytes, dtype=torch.uint8, device=model.device))
    policy = Full(bound=len(tokens))
    cache = Cache(policy, loaded.rotary, slots.buffers(0, scored=False))
    place, runner = Lease(slots, 0, lambda _: None), Runner(model)
    runner.run([Piece(tokens[:-2], cache, place, logits=False)])
    runner.run([Piece(tokens[-2:-1], cache, place, logits=False)])
    ours = runner.run([Piece(tokens[-1:], cache, place, logits=True)])[0].float()
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        theirs = model(torch.tensor([tokens], device=model.device), use_cache=False).logits[0, -1].float()
    model.set_attn_implementation(attention.NAME)
    tolerance = 1e-3 if model.dtype == loaded.geometry.dtype == torch.float32 else 0.1
    if not torch.allclose(ours, theirs, atol=tolerance * float(theirs.abs().max())):
        raise UnservableModel(
            f"{path} ({loaded.architecture}) attends in a way that this worker does not know: over its cache "
            f"the logits differ by up to {float((ours - theirs).abs().max()):.3g} from the model's own"
        )


def _eos(model: PreTrainedModel, config: PretrainedConfig) -> tuple[int, ...]:
    ids = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = config.eos_token_id if ids is None else ids
    return tuple(ids) if isinstance(ids, list) else () if ids is None else (int(ids),)


def _read_json(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnservableModel(f"{path} cannot be read: {error}") from error
    return content if isinstance(content, dict) else {}
