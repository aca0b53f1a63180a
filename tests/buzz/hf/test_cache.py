from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from apiary_server.model import catalog
from buzz import PolicyError
from buzz.hf import BuzzCache, UnsupportedError
from tests.buzz.hf.models import (
    LENGTH,
    MERGING,
    ORIGINAL,
    OTHERS,
    PROMPTS,
    QUANTISED,
    SMALL,
    generate,
    kept,
    logits,
    model_of,
    padded,
    sized,
    tokens,
)


def test_full_is_the_dynamic_cache(model: PreTrainedModel) -> None:
    prompt, batch = tokens(1, 20), padded(PROMPTS)
    expected = generate(model, prompt, DynamicCache(), 30)
    assert generate(model, prompt, BuzzCache(model, "full"), 30).equal(expected)
    assert len(expected[0, 20:].unique()) > 5  # no model that repeats itself, whose tokens show nothing
    expected = generate(model, batch, DynamicCache(), 30)
    assert generate(model, batch, BuzzCache(model, "full"), 30).equal(expected)


def test_sampling_draws_the_same_tokens(model: PreTrainedModel) -> None:
    outcomes = []
    for cache in (DynamicCache(), BuzzCache(model, "full")):
        torch.manual_seed(5)
        how = {"do_sample": True, "top_k": 0, "temperature": 1.5, "num_return_sequences": 2}
        outcomes.append(generate(model, padded(PROMPTS), cache, 20, **how))
    assert outcomes[0].equal(outcomes[1])
    assert not outcomes[0][0].equal(outcomes[0][1])


def test_beam_search_finds_the_same_beams(llama: PreTrainedModel) -> None:
    how = {"num_beams": 3, "num_return_sequences": 2}
    expected = generate(llama, padded(PROMPTS), DynamicCache(), 20, **how)
    assert generate(llama, padded(PROMPTS), BuzzCache(llama, "full"), 20, **how).equal(expected)
    bounded = BuzzCache(llama, SMALL[1])
    generate(llama, padded(PROMPTS), bounded, 20, **how)
    assert [row.n <= bounded.policy.bound for row in bounded.rows] == [True] * 9


@pytest.mark.parametrize("spec", [*SMALL, ORIGINAL, *OTHERS[1:], MERGING, *QUANTISED])
def test_a_row_of_a_batch_is_the_prompt_alone_past_the_bound_and_the_model(
    llama: PreTrainedModel, wide: PreTrainedModel, spec: str
) -> None:
    model = wide if spec in QUANTISED else llama
    batch = BuzzCache(model, spec)
    held: list[list[int]] = []

    def look(ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        held.append([row.n for row in batch.rows])
        return torch.zeros(len(ids), dtype=torch.bool)

    ids = generate(model, padded(PROMPTS), batch, 50, stopping_criteria=[look])
    bound = batch.policy.bound
    assert max(map(max, held)) in {bound, bound - 1}  # so the next assertion has something to show
    assert batch.get_seq_length() == 33 + 49 > LENGTH
    assert [row.evicted >= 54 - bound for row in batch.rows] == [True] * 3
    assert [row.packed > 0 for row in batch.rows] == [spec in QUANTISED] * 3
    in_cache = batch.policy.positions == "in_cache"
    assert [row.rotated_in_cache for row in batch.rows] == [
        in_cache or row.seen > LENGTH for row in batch.rows
    ]
    for index, prompt in ((0, PROMPTS[0]), (2, PROMPTS[2])):
        alone = BuzzCache(model, spec)
        expected = generate(model, prompt[None], alone, 50)[0, len(prompt) :]
        assert ids[index, 33:].equal(expected)
        assert batch.rows[index].seen == len(prompt) + 49
        assert batch.rows[index].state() == alone.rows[0].state()
        assert kept(batch, index).equal(kept(alone))


def test_every_architecture_runs_past_the_model_like_a_batch_of_one(model: PreTrainedModel) -> None:
    cache = BuzzCache(model, SMALL[0])
    ids = generate(model, padded(PROMPTS), cache, 40)
    assert ids[2, 33:].equal(generate(model, PROMPTS[2][None], BuzzCache(model, SMALL[0]), 40)[0, 33:])
    assert cache.get_seq_length() > LENGTH
    assert [row.n <= cache.policy.bound for row in cache.rows] == [True] * 3


@pytest.mark.parametrize("spec", ["full", *SMALL])
def test_two_calls_are_one(llama: PreTrainedModel, spec: str) -> None:
    prompts = padded(PROMPTS)
    whole = generate(llama, prompts, BuzzCache(llama, spec), 30)
    cache = BuzzCache(llama, spec)
    first = generate(llama, prompts, cache, 15)
    mask = torch.cat([prompts["attention_mask"], torch.ones(3, 15, dtype=torch.long)], dim=1)
    assert generate(llama, {"input_ids": first, "attention_mask": mask}, cache, 15).equal(whole)


def test_a_second_turn_computes_only_what_is_new(llama: PreTrainedModel) -> None:
    cache = BuzzCache(llama, "full")
    history = generate(llama, tokens(1, 12), cache, 10)
    assert cache.get_seq_length() == 21  # the last token was never fed
    history = torch.cat([history, tokens(1, 8, seed=3)], dim=1)
    answer = generate(llama, history, cache, 10)
    assert answer.equal(generate(llama, history, DynamicCache(), 10))
    assert cache.get_seq_length() == cache.rows[0].seen == 39


def test_a_prompt_longer_than_the_model_comes_in_chunks(llama: PreTrainedModel) -> None:
    cache, ids = BuzzCache(llama, SMALL[0]), tokens(1, 120)
    with pytest.raises(UnsupportedError, match="prefill_chunk_size=42"):
        generate(llama, ids, cache, 5)
    assert cache.get_seq_length() == 0
    answer = generate(llama, ids, cache, 5, prefill_chunk_size=42)
    stepped = BuzzCache(llama, SMALL[0])
    for chunk in ids.split(42, dim=1):
        last = logits(llama, chunk, stepped)
    assert answer[0, 120] == last[0, -1].argmax()
    assert cache.rows[0].seen == 124


def test_padding_may_stand_anywhere(llama: PreTrainedModel) -> None:
    cache, alone = BuzzCache(llama, SMALL[0]), BuzzCache(llama, SMALL[0])
    ids, mask = tokens(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[0, [0, 1, 7, 20, 29]] = 0
    real = logits(llama, ids[:1, mask[0].bool()], alone)
    counted = mask.cumsum(dim=1) - 1
    padded_in = logits(llama, ids, cache, attention_mask=mask, position_ids=counted)[0, mask[0].bool()]
    torch.testing.assert_close(padded_in, real[0], atol=1e-4, rtol=0)
    mask = torch.cat([mask, torch.tensor([[0], [1]])], dim=1)  # nothing new in row 0
    logits(llama, tokens(2, 1), cache, attention_mask=mask)
    assert [row.seen for row in cache.rows] == [25, 31]
    assert kept(cache, 0).equal(kept(alone))


@pytest.mark.parametrize("side", ["left", "right"])
def test_without_a_mask_padding_stays_padding_and_new_tokens_are_real(
    llama: PreTrainedModel, side: str
) -> None:
    cache, alone = BuzzCache(llama, SMALL[0]), BuzzCache(llama, SMALL[0])
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, slice(6) if side == "left" else slice(14, 20)] = 0
    logits(llama, ids, cache, attention_mask=mask)
    logits(llama, ids[:1, mask[0].bool()], alone)
    for count in (3, 1):
        new = tokens(2, count, seed=count)
        expected = logits(llama, new[:1], alone)
        torch.testing.assert_close(logits(llama, new, cache)[:1], expected, atol=1e-4, rtol=0)
    assert [row.seen for row in cache.rows] == [18, 24]


def test_positions_that_jump_are_refused(llama: PreTrainedModel) -> None:
    cache, ids, mask = BuzzCache(llama, SMALL[0]), tokens(2, 8), torch.ones(2, 8, dtype=torch.long)
    hole = mask.clone()
    hole[1, 3] = 0
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    jump = torch.arange(8).repeat(2, 1)
    jump[1, 6:] += 5
    for how in ({"attention_mask": hole}, {"position_ids": packed}, {"position_ids": jump}):
        with pytest.raises(UnsupportedError, match="do not count up by one"):
            logits(llama, ids, cache, **{"attention_mask": mask, **how})
        assert not cache.is_initialized
    logits(llama, ids, cache, attention_mask=hole, position_ids=hole.cumsum(dim=1) - 1)
    assert [row.seen for row in cache.rows] == [8, 7]


@pytest.mark.parametrize("trained", ["q_proj", "k_proj", "v_proj", "o_proj", "embed_tokens"])
def test_gradients_are_refused_whatever_is_trained(llama: PreTrainedModel, trained: str) -> None:
    model = copy.deepcopy(llama)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    cache, ids = BuzzCache(model, SMALL[0]), tokens(1, 9)
    with pytest.raises(UnsupportedError, match="no gradients"):
        model(ids, past_key_values=cache)
    assert not cache.is_initialized
    expected = logits(model, ids, cache)
    with torch.inference_mode():
        assert model(ids, past_key_values=BuzzCache(model, SMALL[0])).logits.equal(expected)


def test_gradients_that_do_not_pass_the_cache_are_the_models(llama: PreTrainedModel) -> None:
    model, ids, gradients = copy.deepcopy(llama), tokens(1, 9), []
    model.requires_grad_(False)
    head = model.lm_head.weight.requires_grad_()
    for cache in (BuzzCache(model, "full"), DynamicCache()):
        loss = model(ids, past_key_values=cache).logits.square().mean()
        gradients += torch.autograd.grad(loss, head)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)
    with pytest.raises(UnsupportedError, match="no gradients"):
        model(
            inputs_embeds=torch.zeros(1, 3, 32, requires_grad=True), past_key_values=BuzzCache(model, "full")
        )


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_another_model_is_refused(llama: PreTrainedModel, layers: int, attention: str) -> None:
    cache = BuzzCache(llama, SMALL[0])
    other = model_of(sized(LlamaConfig, num_hidden_layers=layers), attention)
    for _ in range(2):  # as it was loaded, and with attention of ours
        with pytest.raises(UnsupportedError, match=r"made for another model: BuzzCache\(model"):
            generate(other, tokens(1, 9), cache, 4)
        assert not cache.is_initialized
        BuzzCache(other, SMALL[0])
    logits(llama, tokens(1, 9), cache)


def test_models_of_one_config_are_two() -> None:
    config = sized(LlamaConfig)
    model, other = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    assert model.config is other.config
    cache = BuzzCache(model, SMALL[0])
    with pytest.raises(UnsupportedError, match="made for another model"):
        logits(other, tokens(1, 9), cache)
    logits(model, tokens(1, 9), cache)


def test_a_cache_keeps_no_model_alive() -> None:
    model = model_of(sized(LlamaConfig))
    cache, gone = BuzzCache(model, SMALL[0]), weakref.ref(model.model)
    other = copy.deepcopy(model)
    del model
    gc.collect()
    assert gone() is None
    with pytest.raises(UnsupportedError, match="made for another model"):
        logits(other, tokens(1, 9), cache)


def test_a_copy_continues_on_its_own(llama: PreTrainedModel) -> None:
    prefix, one, two = tokens(1, 40), tokens(1, 9, seed=1), tokens(1, 9, seed=2)
    cache = BuzzCache(llama, SMALL[0])
    empty = copy.deepcopy(cache)
    logits(llama, prefix, cache)
    twin = copy.deepcopy(cache)
    first, second = logits(llama, one, cache), logits(llama, two, twin)
    assert second.equal(logits(llama, two, _after(llama, prefix)))
    assert first.equal(logits(llama, one, _after(llama, prefix)))
    assert (empty.rows, empty.get_seq_length()) == ((), 0)
    cache.reset()
    assert (cache.nbytes, cache.batch_size, cache.get_seq_length()) == (0, -1, 0)
    logits(llama, prefix, cache)
    assert logits(llama, one, cache).equal(first)


def _after(model: PreTrainedModel, prefix: Tensor) -> BuzzCache:
    cache = BuzzCache(model, SMALL[0])
    logits(model, prefix, cache)
    return cache


def test_rows_repeat_and_are_selected(llama: PreTrainedModel) -> None:
    cache = BuzzCache(llama, SMALL[1])
    ids = tokens(2, 30)
    logits(llama, ids, cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    assert cache.batch_size == 2
    swapped = logits(llama, tokens(1, 1).expand(2, 1), cache)
    again = BuzzCache(llama, SMALL[1])
    logits(llama, ids, again)
    assert swapped.equal(logits(llama, tokens(1, 1).expand(2, 1), again).flip(0))
    seen = [row.state() for row in again.rows]
    with pytest.raises(IndexError, match="index 2 is out of bounds"):
        again.batch_select_indices(torch.tensor([0, 2]))
    again.batch_select_indices([1])
    assert [row.state() for row in again.rows] == seen[1:]


def test_memory_is_the_bound_at_rest(llama: PreTrainedModel) -> None:
    cache = BuzzCache(llama, SMALL[0])
    assert cache.nbytes == 0
    generate(llama, padded(PROMPTS), cache, 30)
    entry = 2 * 2 * (2 * 8 * 4 + 4 + 4)  # layers, KV heads, a key and a value, a position, a score
    assert cache.nbytes == 3 * (cache.policy.bound + 1) * entry
    logits(llama, tokens(3, 40), cache, attention_mask=_mask_for(cache, 40))
    assert cache.nbytes == 3 * (cache.policy.bound + 1) * entry
    full = BuzzCache(llama, "full")
    logits(llama, tokens(1, 10), full)
    entry -= 2 * 2 * 4  # it keeps no score
    assert 10 * entry <= full.nbytes < (full.policy.bound + 1) * entry


def test_quantised_entries_take_few_bytes(llama: PreTrainedModel, wide: PreTrainedModel) -> None:
    sizes = []
    for kivi in ("kivi=4,residual=8", "kivi=2,residual=8", "kivi=none"):
        cache = BuzzCache(wide, f"streaming(sink=2,window=58,{kivi})")
        logits(wide, tokens(3, 62), cache)
        sizes.append(cache.nbytes)
    heads, vector = 3 * 2 * 2, 2 * 32  # rows, layers and KV heads; channels of a key and a value
    dense = heads * 61 * (vector * 4 + 4)
    fewer = [
        61 * 4 + (8 + 32) * vector * 4 + (60 - 8) * vector * (bits + 1) // 8 + 2 * vector for bits in (4, 2)
    ]
    assert sizes == [heads * fewer[0], heads * fewer[1], dense]
    with pytest.raises(UnsupportedError, match="groups of 32 channels, and LlamaForCausalLM has heads of 8"):
        BuzzCache(llama, QUANTISED[0])


def _mask_for(cache: BuzzCache, new: int) -> Tensor:
    mask = torch.ones(len(cache.rows), cache.get_seq_length() + new, dtype=torch.long)
    for row, held in enumerate(cache.rows):
        mask[row, : cache.get_seq_length() - held.seen] = 0
    return mask


def test_half_precision_and_inference_mode_work(llama: PreTrainedModel) -> None:
    half = copy.deepcopy(llama).to(torch.bfloat16)
    cache = BuzzCache(half, SMALL[0])
    with torch.inference_mode():
        first = generate(half, tokens(1, 12), cache, 20)
    assert cache.rows[0].buffers.keys.dtype == torch.bfloat16
    assert len(generate(half, first, cache, 20)[0]) == 52


def test_ways_to_generate_that_take_back_tokens_are_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(UnsupportedError, match="takes tokens back"):
        generate(llama, tokens(1, 9), BuzzCache(llama, SMALL[0]), 9, prompt_lookup_num_tokens=2)
    with pytest.raises(UnsupportedError, match="takes tokens back"):
        generate(llama, tokens(1, 9), BuzzCache(llama, SMALL[0]), 9, assistant_model=copy.deepcopy(llama))
    with pytest.raises(UnsupportedError, match="cannot be cropped"):
        BuzzCache(llama, SMALL[0]).crop(-1)
    with pytest.raises(ValueError, match="cache_implementation"):
        generate(llama, tokens(1, 9), BuzzCache(llama, SMALL[0]), 9, cache_implementation="static")


def without_positions(model: PreTrainedModel, ids: Tensor, cache: BuzzCache) -> Tensor:
    """A model that does not tell its attention the positions."""

    def drop(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "position_ids": None}

    hook = model.model.layers[0].self_attn.register_forward_pre_hook(drop, with_kwargs=True)
    try:
        return logits(model, ids, cache)
    finally:
        hook.remove()


def test_forward_calls_that_make_no_sense_are_refused_and_change_nothing(llama: PreTrainedModel) -> None:
    cache, other = BuzzCache(llama, SMALL[0]), copy.deepcopy(llama)
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :5] = 0
    BuzzCache(other, SMALL[0])
    logits(llama, ids, cache, attention_mask=mask)
    before = [row.state() for row in cache.rows]
    calls: list[tuple[str, Callable[[], object]]] = [
        ("no gradients", lambda: llama(tokens(2, 1), past_key_values=cache)),
        ("a batch of 2, and 1 rows", lambda: logits(llama, tokens(1, 1), cache)),
        ("another model", lambda: logits(other, tokens(2, 1), cache)),
        ("not \\[2, 20\\]", lambda: logits(llama, tokens(2, 1), cache, attention_mask=mask)),
        (
            "not \\[2, 1, 1, 21\\]",
            lambda: logits(llama, tokens(2, 1), cache, attention_mask=torch.ones(2, 1, 1, 21).bool()),
        ),
        (
            "20 earlier tokens in row 0, where the cache has seen 15",
            lambda: logits(llama, tokens(2, 1), cache, attention_mask=torch.ones(2, 21)),
        ),
        ("exceed the model's 64 positions", lambda: logits(llama, tokens(2, 60), cache)),
        ("one position for each token", lambda: without_positions(llama, tokens(2, 1), cache)),
        ("output_attentions", lambda: logits(llama, tokens(2, 1), cache, output_attentions=True)),
    ]
    for reason, call in calls:
        with pytest.raises(UnsupportedError, match=reason):
            call()
        assert ([row.state() for row in cache.rows], cache.get_seq_length()) == (before, 20), reason
    logits(llama, tokens(2, 1), cache)


def test_a_model_compiled_to_one_graph_is_refused(llama: PreTrainedModel) -> None:
    cache = BuzzCache(llama, SMALL[0])
    with pytest.raises(Exception, match="call it uncompiled"):  # of dynamo, around ours
        logits(torch.compile(llama, backend="eager", fullgraph=True), tokens(1, 9), cache)
    torch.compiler.reset()
    assert not cache.is_initialized
    logits(llama, tokens(1, 9), cache)


def test_a_full_cache_says_so(llama: PreTrainedModel) -> None:
    cache = BuzzCache(llama, "full(bound=30)")
    assert (cache.get_max_length(), BuzzCache(llama, SMALL[0]).get_max_length()) == (30, -1)
    with pytest.raises(PolicyError, match="is full, 31 entries do not fit"):
        generate(llama, tokens(1, 20), cache, 40)
    assert cache.rows[0].n == 30


def test_a_call_that_stopped_halfway_is_noticed(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, ids = BuzzCache(llama, SMALL[0]), tokens(1, 9)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = llama.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        logits(llama, ids, cache)
    hook.remove()
    with pytest.raises(UnsupportedError, match="layer 0 came where layer 1 was due: an earlier forward call"):
        logits(llama, ids, cache)
    cache.reset()
    with monkeypatch.context() as patch:
        patch.setattr("buzz.batch.attend_chunk", None)
        with pytest.raises(TypeError):
            logits(llama, ids, cache)
    with pytest.raises(UnsupportedError, match="layer 0 came where layer 1 was due: an earlier forward call"):
        logits(llama, ids, cache)
    cache.reset()
    assert logits(llama, ids, cache).equal(logits(llama, ids, BuzzCache(llama, SMALL[0])))
    llama.set_attn_implementation("sdpa")
    with pytest.raises(UnsupportedError, match="was switched to sdpa after this cache"):
        logits(llama, ids, cache)
    BuzzCache(llama, SMALL[0])  # switches it back
    logits(llama, ids, cache)


@pytest.mark.model
def test_the_default_model_answers() -> None:
    path = catalog.resolve("smollm2-135m")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    start = inputs["input_ids"].shape[1]
    expected = generate(model, dict(inputs), DynamicCache(), 8)
    assert generate(model, dict(inputs), BuzzCache(model, "full"), 8).equal(expected)
    cache = BuzzCache(model, "buzz(sink=4,window=24,threshold=12,stride=4)")
    ids = generate(model, dict(inputs), cache, 8)
    assert cache.rows[0].evicted > 0
    assert "Paris" in tokenizer.decode(ids[0, start:])
