"""Decode steps that are played, against the same computed one operation after the other."""

from __future__ import annotations

import random
from typing import Literal

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from apiary_server.model.attention import Batch, DecodeRun
from apiary_server.model.backends.cpu import Cpu, float32, int8
from apiary_server.model.backends.cpu.step import DecodeStep, by_kernels
from apiary_server.model.backends.cpu.tape import Tape
from buzz import Buffers, State
from tests import tiny
from tests.server.model.test_decoder import FAMILY, model_of

SLOTS, CAPACITY, STATES = 40, 24, (State("mass"),)


def memory() -> Buffers:
    config = tiny.config()
    head_dim = config.hidden_size // config.num_attention_heads
    shape = (SLOTS, config.num_hidden_layers, config.num_key_value_heads, CAPACITY)
    keys, values = torch.randn(2, *shape, head_dim)
    position = torch.zeros(shape, dtype=torch.int32)
    return Buffers(keys, values, position, {"mass": torch.zeros(shape)})


def copy(buffers: Buffers) -> Buffers:
    return buffers.map(torch.clone)


def step_of(generator: random.Random, cache: Buffers, count: int) -> tuple[Tensor, Tensor, Tensor, Batch]:
    """Tokens for so many slots, in any order, whose logits are wanted in another."""
    slots, order = generator.sample(range(SLOTS), count), generator.sample(range(count), count)
    entries = torch.tensor(generator.choices(range(1, CAPACITY - 1), k=count))
    tokens = torch.tensor(generator.choices(range(3, 250), k=count))
    run = DecodeRun(slice(0, count), cache, entries, entries, int(entries.max()) + 1, STATES, None, slots)
    return tokens, entries, torch.tensor(order), Batch(decodes=[run])


@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_it_gives_the_same_bits(weights: Literal["fp32", "int8"]) -> None:
    if not (float32 if weights == "fp32" else int8).supported():
        pytest.skip("there is no such kernel for this processor")
    torch.manual_seed(0)
    generator = random.Random(0)
    backend = Cpu(LlamaForCausalLM(tiny.config()).eval(), weights)
    assert isinstance(backend._step, DecodeStep)
    ours = memory()
    theirs = copy(ours)
    with torch.inference_mode():
        for count in (1, 16, 3, 17, 40, 1, 33):  # through recordings for more
            step = step_of(generator, ours, count)
            assert backend._step.takes(step[2], step[3])
            run = step[3].decodes[0]
            twin = DecodeRun(
                run.rows, theirs, run.entries, run.seen, run.most, run.states, run.log_n, run.slots
            )
            found = backend.forward(*step)
            expected = backend._decoder.forward(*step[:3], Batch(decodes=[twin]))
            assert torch.equal(found, expected)
            for mine, other in zip(every(ours), every(theirs), strict=True):
                assert torch.equal(mine, other)


def test_a_recording_that_failed_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    backend = Cpu(LlamaForCausalLM(tiny.config()).eval(), "fp32")
    cache, generator = memory(), random.Random(0)
    small, large = (step_of(generator, cache, count) for count in (3, 20))

    def failing(*_: object) -> Tensor:
        raise MemoryError

    with torch.inference_mode():
        expected = backend.forward(*small)
        with monkeypatch.context() as patch:
            patch.setattr(Tape, "output", failing)
            with pytest.raises(MemoryError):
                backend.forward(*large)
        assert torch.equal(backend.forward(*small).argmax(), expected.argmax())
        assert backend.forward(*large).isfinite().all()


def every(buffers: Buffers) -> list[Tensor]:
    return [buffers.keys, buffers.values, buffers.state["mass"]]


def test_in_whatever_mode_it_was_recorded_it_is_played_in_all() -> None:
    torch.manual_seed(0)
    backend = Cpu(LlamaForCausalLM(tiny.config()).eval(), "fp32")
    cache, generator = memory(), random.Random(0)
    with torch.inference_mode():
        backend.forward(*step_of(generator, cache, 2))
    assert not backend.forward(*step_of(generator, cache, 2)).requires_grad


@pytest.mark.parametrize("name", FAMILY)
def test_only_what_kernels_do_is_recorded(name: str) -> None:
    decoder = Cpu(model_of(FAMILY[name]()), "fp32")._decoder
    assert by_kernels(decoder) == (float32.supported() and name not in ("qwen3", "gemma"))


def test_it_takes_no_other_steps() -> None:
    if not float32.supported():
        pytest.skip("there is no such kernel for this processor")
    backend = Cpu(LlamaForCausalLM(tiny.config()).eval(), "fp32")
    assert backend._step is not None
    _, _, keep, batch = step_of(random.Random(0), memory(), 4)
    run = batch.decodes[0]
    assert backend._step.takes(keep, batch)
    assert not backend._step.takes(keep[:3], batch), "not all logits are wanted"
    assert not backend._step.takes(keep, Batch(decodes=[run, run]))
    assert not backend._step.takes(keep, Batch())
    half = Buffers(run.cache.keys.half(), run.cache.values.half(), run.cache.position, run.cache.state)
    other = DecodeRun(run.rows, half, run.entries, run.seen, run.most, run.states, run.log_n, run.slots)
    assert not backend._step.takes(keep, Batch(decodes=[other])), "the kernel does not read float16"
