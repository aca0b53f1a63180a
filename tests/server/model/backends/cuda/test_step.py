from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from apiary_server.model.backends.cuda.graphs import Compute
from apiary_server.model.backends.cuda.step import INPUTS, DecodeStep, decode_step
from apiary_server.model.decoder import Decoder
from apiary_server.model.operations import Operations
from apiary_server.sessions.pool import Geometry, SlotClass, SlotLayout
from buzz import State
from tests.server.model.backends.cuda.recorder import Recorder
from tests.server.model.test_decoder import FAMILY, model_of

CAPACITY, SLOTS = 24, 7
STATES = (State("score", decay=0.9), State("vote", "vote"))


def slot_class() -> SlotClass:
    layout = SlotLayout(Geometry(2, 2, 8, torch.float32), CAPACITY, states=2)
    return SlotClass(layout, torch.zeros(SLOTS * layout.bytes, dtype=torch.uint8))


def inputs_of(seed: int, count: int) -> Tensor:
    """Distinct slots, and any tokens, positions, entries and seen."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(1, CAPACITY - 1, (INPUTS, count), generator=generator)
    rows[2] = torch.randperm(SLOTS, generator=generator)[:count]
    return rows


@torch.inference_mode()
def test_its_memory_stays_where_it_is_and_its_results_follow_its_inputs() -> None:
    decoder = Decoder.of(model_of(FAMILY["llama"]()), Operations())
    ours, theirs, recorder = slot_class(), slot_class(), Recorder()
    step = DecodeStep(decoder, recorder, ours, STATES, None, 4, CAPACITY)
    expected_of = partial(decode_step, decoder, theirs.buffers(slice(None), STATES), STATES, None, CAPACITY)
    addresses = set()
    for seed, count in enumerate([4, 3, 1, 2, 4, 4]):
        inputs = inputs_of(seed, count)
        found = step(inputs)
        torch.testing.assert_close(found, expected_of(inputs), rtol=1e-5, atol=1e-5)
        assert found.shape == (count, decoder.norm.weight.numel())
        assert torch.equal(step.inputs[:, :count], inputs)
        assert torch.equal(step.inputs[:, count:], inputs[:, :1].expand(-1, 4 - count))
        addresses.add((step.inputs.data_ptr(), found.data_ptr() if seed else None))
        for one, other in (
            (ours.keys, theirs.keys),
            (ours.values, theirs.values),
            (ours.state, theirs.state),
        ):
            assert one is not None
            assert other is not None
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert len(addresses) == 2, "of the first run, and of all replays"
    assert [(graph.runs, graph.replays) for graph in recorder.graphs] == [(6, 5)]


@torch.inference_mode()
def test_a_value_of_the_host_would_be_frozen() -> None:
    """What the recorder is for: it tells a function that looks at its inputs from one that does not."""
    source = torch.zeros(2)

    def honest() -> Tensor:
        return source * 2

    def looking() -> Tensor:
        return torch.full((2,), 2 * float(source[0]))

    outcomes = []
    for compute in (honest, looking):
        replay: Compute = Recorder()(compute)
        for value in (1.0, 2.0, 3.0):
            source.fill_(value)
            outcomes.append(float(replay()[0]))
    assert outcomes == [2, 4, 6, 2, 4, 4]


@torch.inference_mode()
def test_recording_computes_nothing() -> None:
    counter, output = torch.zeros(1), torch.zeros(1)

    def count() -> Tensor:
        counter.add_(1)
        return output.copy_(counter)

    replay = Recorder()(count)
    assert [int(replay()) for _ in range(4)] == [1, 2, 3, 4]


@pytest.mark.parametrize("log_n", [None, 4])
@torch.inference_mode()
def test_a_longer_reach_changes_nothing(log_n: int | None) -> None:
    decoder = Decoder.of(model_of(FAMILY["qwen3"]()), Operations())
    layout = SlotLayout(Geometry(2, 2, 16, torch.float32), CAPACITY, states=2)
    inputs = inputs_of(0, 3)
    inputs[3] = torch.tensor([3, 7, 11])
    results = []
    for longest in (12, 16, CAPACITY):
        slots = SlotClass(layout, torch.zeros(SLOTS * layout.bytes, dtype=torch.uint8))
        cache = slots.buffers(slice(None), STATES)
        results.append((decode_step(decoder, cache, STATES, log_n, longest, inputs), slots.state))
    for result, state in results[1:]:
        torch.testing.assert_close(result, results[0][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state, results[0][1], rtol=1e-5, atol=1e-5)
