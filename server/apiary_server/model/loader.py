"""Loads a model for serving, or refuses it in one clear sentence."""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog
import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from apiary_server.errors import ApiaryError
from apiary_server.model.backends import Backend, ForeignStructure, Kind, Reference, Weights, choose
from apiary_server.model.backends.reference import NAME
from apiary_server.model.runner import Piece, Runner
from apiary_server.model.tokenizer import Tokenizer
from apiary_server.sessions.pool import Geometry, Lease, SlotClass, SlotLayout
from buzz import Cache, Rotary
from buzz.policies.full import Full

_log = structlog.get_logger(__name__)
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
    """A model ready for `Runner`; `exact` says whether its weights are as they were trained."""

    backend: Backend
    tokenizer: Tokenizer
    rotary: Rotary
    geometry: Geometry
    architecture: str
    query_heads: int
    eos_token_ids: tuple[int, ...]
    exact: bool = True


def load(
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    backend: Kind = "auto",
    weights: Weights = "fp32",
) -> LoadedModel:
    """Load a Hugging Face directory.

    Args:
        path: the directory.
        device: where it will run.
        dtype: of what lies between the layers.
        cache_dtype: of the entries in the caches.
        backend: what computes.
        weights: how it keeps them.

    Raises:
        UnservableModel: the files are not a model, or not one whose layers this worker can serve so.
    """
    threads = torch.get_num_threads()
    # thousands of small operations: threads would wait for each other (beside another worker that computes, a
    # start took 52 s and not 9)
    torch.set_num_threads(1)
    try:
        loaded, model = _load(path, device, dtype, cache_dtype)
        return _with_backend(path, loaded, model, backend, weights)
    except UnservableModel:
        raise
    except Exception as error:  # what transformers raises for odd files has no common base
        reason = textwrap.shorten(str(error), 400)
        raise UnservableModel(f"{path} cannot be loaded: {reason} ({type(error).__name__})") from error
    finally:
        torch.set_num_threads(threads)


def _load(
    path: Path, device: torch.device, dtype: torch.dtype, cache_dtype: torch.dtype
) -> tuple[LoadedModel, PreTrainedModel]:
    logging.disable_progress_bar()
    if "auto_map" in _read_json(path / "config.json"):
        raise UnservableModel(f"{path} needs code of its own (auto_map in config.json), which is never run")
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    _check_config(path, config)
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if not getattr(architecture, "_supports_attention_backend", False):
        raise UnservableModel(
            f"{path} ({config.model_type}) has attention of its own, which cannot be replaced"
        )
    if not any(path.glob("*.safetensors")):
        raise UnservableModel(f"{path} has no safetensors weights; pickled ones are never loaded")
    backend = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    if not getattr(backend, "is_fast", False) or not len(backend):
        raise UnservableModel(f"{path} has no tokenizer.json (a fast tokenizer), which streaming needs")
    weights: Any = AutoModelForCausalLM.from_pretrained(
        path,
        config=config,
        dtype=dtype,
        attn_implementation=NAME,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    model, report = weights
    wrong = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if wrong:  # transformers would make them up
        raise UnservableModel(
            f"{path} lacks {len(wrong)} weights or has them in other shapes: {wrong[0]}, ..."
        )
    model.to(device)
    model.eval()
    heads = config.num_attention_heads
    geometry = Geometry(
        layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        dtype=cache_dtype,
    )
    loaded = LoadedModel(
        backend=Reference(model),
        tokenizer=Tokenizer(backend, config.vocab_size),
        rotary=_rotary(path, model, config),
        geometry=geometry,
        architecture=type(model).__name__,
        query_heads=heads,
        eos_token_ids=_eos(model, config),
    )
    _check_forward(path, loaded, model)
    _check_moves(path, loaded)
    return loaded, model


def _with_backend(
    path: Path, loaded: LoadedModel, model: PreTrainedModel, kind: Kind, weights: Weights
) -> LoadedModel:
    """The same model with another compute, where there is one that gives the same."""
    try:
        chosen = replace(loaded, backend=choose(kind, weights, model), exact=weights == "fp32")
        _check_forward(path, chosen, model)
    except (ForeignStructure, UnservableModel) as error:
        if kind != "auto" or weights != "fp32":
            raise UnservableModel(
                f"{path} cannot run on backend {kind} with {weights} weights: {error}"
            ) from error
        _log.info("the model runs in its own modules", reason=str(error))
        return loaded
    return chosen


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
    """The model's rotary embedding; `_check_moves` checks that it rotates as ours does."""
    inv_freq = getattr(getattr(model.base_model, "rotary_emb", None), "inv_freq", None)
    if inv_freq is None:
        raise UnservableModel(f"{path} has no rotary positions that can be moved")
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind in {"dynamic", "longrope"}:
        raise UnservableModel(f"{path} has rotary positions of type {kind}, which change with the length")
    return Rotary(inv_freq.detach().clone(), config.max_position_embeddings)


def _check_forward(path: Path, loaded: LoadedModel, model: PreTrainedModel) -> None:
    """Compare a few tokens over our cache, a chunk and three more, with the model's own attention. This
    catches whatever in a model's attention no configuration field tells; and the third is computed by what a
    backend may have recorded at the second."""
    tokens = _sample(loaded)
    cache, place = _scratch(loaded, len(tokens))
    runner = Runner(loaded.backend)
    for cut in (slice(-3), slice(-3, -2), slice(-2, -1)):
        runner.run([Piece(tokens[cut], cache, place, logits=False)])
    ours = runner.run([Piece(tokens[-1:], cache, place, logits=True)])[0].float()
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        theirs = model(torch.tensor([tokens], device=model.device), use_cache=False).logits[0, -1].float()
    model.set_attn_implementation(NAME)
    if not theirs.isfinite().all():
        raise UnservableModel(f"{path} computes logits that are not finite in {model.dtype}")
    if not torch.allclose(ours, theirs, atol=_tolerance(loaded) * float(theirs.abs().max())):
        raise UnservableModel(
            f"{path} ({loaded.architecture}) attends in a way that this worker does not know: over its cache "
            f"the logits differ by up to {float((ours - theirs).abs().max()):.3g} from the model's own"
        )


def _check_moves(path: Path, loaded: LoadedModel) -> None:
    """Compare keys that our rotation moved with keys that the model itself put there, in every layer. This
    catches other conventions of rotation, and layers that do not rotate."""
    tokens = _sample(loaded)
    last = min(512, loaded.rotary.max_positions) - len(tokens)

    def piece_at(position: int) -> Piece:
        cache, place = _scratch(loaded, len(tokens))
        cache.seen = position
        return Piece(tokens, cache, place, logits=False)

    pieces = [piece_at(3), piece_at(last)]
    Runner(loaded.backend).run(pieces)
    everything = slice(0, loaded.geometry.layers)
    here, there = (piece.cache.buffers.read(everything, len(tokens), torch.float32)[0] for piece in pieces)
    moved = loaded.rotary.rotate(here, torch.full((len(tokens),), last - 3, device=here.device))
    if not torch.allclose(moved, there, atol=_tolerance(loaded) * float(there.abs().max())):
        raise UnservableModel(
            f"{path} ({loaded.architecture}) rotates positions in a way that does not compose, or not "
            "in every layer, so survivors of an eviction could not move"
        )


def _sample(loaded: LoadedModel) -> list[int]:
    """From all over the vocabulary: the first ones are special, and a row of them multiplies every error."""
    return [(2 * i + 1) * loaded.tokenizer.vocab_size // 16 for i in range(8)]


def _scratch(loaded: LoadedModel, entries: int) -> tuple[Cache, Lease]:
    """An empty cache of its own, whose tokens have their original positions."""
    layout = SlotLayout(loaded.geometry, entries, states=0)
    slots = SlotClass(layout, torch.zeros(layout.bytes, dtype=torch.uint8, device=loaded.backend.device))
    policy = Full(bound=entries, positions="original")
    return Cache(policy, loaded.rotary, slots.buffers(0, ())), Lease(slots, 0, lambda _: None)


def _tolerance(loaded: LoadedModel) -> float:
    """Relative to the largest value."""
    return 1e-3 if loaded.exact and loaded.backend.dtype == loaded.geometry.dtype == torch.float32 else 0.1


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
