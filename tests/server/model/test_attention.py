"""The attention function alone: against a plain softmax, on memory full of garbage, and on another device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM

from apiary_server.model.attention import Batch, ChunkRun, DecodeRun
from apiary_server.model.backends.reference import NAME, Reference, cached_attention
from apiary_server.model.runner import Piece, Runner
from apiary_server.sessions.pool import Geometry, Lease, Pool, SlotLayout
from buzz import Buffers, Cache, Rotary, State, parse
from tests import tiny

HEADS, KV_HEADS, DIM, CAPACITY = 4, 2, 8, 16


class Layer(nn.Module):
    """All that the attention function reads of a layer."""

    def __init__(self, layer_idx: object) -> None:
        super().__init__()
        self.layer_idx = layer_idx


def naive(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """One query `[heads, dim]` over keys and values `[kv_heads, n, dim]`."""
    keys, values = (t.repeat_interleave(HEADS // KV_HEADS, dim=0) for t in (keys, values))
    weights = ((keys @ query.unsqueeze(-1)).squeeze(-1) * scale).softmax(dim=-1)
    return (weights.unsqueeze(1) @ values).squeeze(1)


def buffers(slots: int, states: tuple[State, ...]) -> Buffers:
    """Memory of two layers in which every unwritten value is NaN."""
    shape = (slots, 2, KV_HEADS, CAPACITY)
    return Buffers(
        torch.full((*shape, DIM), math.nan, dtype=torch.float64),
        torch.full((*shape, DIM), math.nan, dtype=torch.float64),
        torch.zeros(shape, dtype=torch.int32),
        {state.name: torch.zeros(shape) for state in states},
    )


def rows(count: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(1, HEADS, count, DIM, dtype=torch.float64),
        torch.randn(1, KV_HEADS, count, DIM, dtype=torch.float64),
        torch.randn(1, KV_HEADS, count, DIM, dtype=torch.float64),
    )


@pytest.mark.parametrize("scaling", [None, 0.37])
@pytest.mark.parametrize("states", [(State("score"),), ()])
def test_rows_see_their_own_caches_and_nothing_else(states: tuple[State, ...], scaling: float | None) -> None:
    torch.manual_seed(0)
    layer, scale = 1, scaling or DIM**-0.5
    decoding, prompt = buffers(3, states), buffers(1, states)
    entries = [0, 5, CAPACITY - 1]
    for slot, n in enumerate(entries):
        decoding.keys[slot, layer, :, :n] = torch.randn(KV_HEADS, n, DIM)
        decoding.values[slot, layer, :, :n] = torch.randn(KV_HEADS, n, DIM)
    prompt.keys[0, layer, :, :2], prompt.values[0, layer, :, :2] = torch.randn(2, KV_HEADS, 2, DIM).double()
    query, key, value = rows(3 + 4)
    own = {name: state[0] for name, state in prompt.state.items()}
    batch = Batch(
        decodes=[
            DecodeRun(
                slice(0, 3), decoding, torch.tensor(entries), torch.tensor(entries), CAPACITY, states, None
            )
        ],
        chunks=[
            ChunkRun(
                slice(3, 7),
                Buffers(prompt.keys[0], prompt.values[0], prompt.position[0], own),
                2,
                2,
                states,
                None,
            )
        ],
    )
    output, weights = cached_attention(
        Layer(layer), query, key, value, None, scaling, apiary_batch=batch, dropout=0.0
    )
    assert weights is None
    assert output.shape == (1, 7, HEADS, DIM)
    for slot, n in enumerate(entries):
        keys, values = decoding.keys[slot, layer, :, : n + 1], decoding.values[slot, layer, :, : n + 1]
        assert torch.equal(keys[:, n], key[0, :, slot])
        assert torch.allclose(output[0, slot], naive(query[0, :, slot], keys, values, scale))
    for row in range(4):
        keys, values = prompt.keys[0, layer, :, : 3 + row], prompt.values[0, layer, :, : 3 + row]
        assert torch.allclose(output[0, 3 + row], naive(query[0, :, 3 + row], keys, values, scale))
    if states:
        per_head = HEADS / KV_HEADS  # each query head's weights sum to one
        sums = decoding.state["score"][:, layer].sum(dim=-1)
        assert torch.allclose(sums, torch.full_like(sums, per_head))
        assert prompt.state["score"][0, layer].sum(dim=-1).tolist() == pytest.approx(
            [4 * per_head] * KV_HEADS
        )
        assert not decoding.state["score"][:, 0].any(), "another layer was touched"
    assert decoding.keys[:, 0].isnan().all(), "another layer was touched"


def test_layers_must_be_numbered() -> None:
    with pytest.raises(TypeError, match="numbered"):
        cached_attention(Layer(None), *rows(1), None, apiary_batch=Batch())


class OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of two devices, as a GPU would, but for copies and lone numbers."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        leaves = tree_leaves((args, kwargs or {}))
        devices = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()}
        if len(devices) > 1 and func.overloadpacket not in (torch.ops.aten.copy_, torch.ops.aten._to_copy):
            raise AssertionError(f"{func} mixes {devices}")
        return func(*args, **kwargs or {})


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device that is not the CPU: shapes and devices are checked, nothing is computed."""
    # they look at values, which such tensors do not have
    monkeypatch.setattr("buzz.attention._forget_garbage", lambda *_: None)
    monkeypatch.setattr("buzz.compaction._astray", lambda *_: None)
    monkeypatch.setattr("buzz.moving._least", lambda _: 2)
    return torch.device("meta")


def test_the_whole_step_stays_on_the_models_device(elsewhere: torch.device) -> None:
    model = LlamaForCausalLM(tiny.config(head_dim=32)).eval().to(elsewhere)
    model.set_attn_implementation(NAME)
    geometry = Geometry(2, 2, 32, torch.bfloat16)
    specs = [
        "full(bound=20)",
        "buzz(sink=2,window=4,threshold=6)",
        "buzz(sink=2,window=4,threshold=6,log_n=8)",
    ]
    specs += ["h2o(heavy=6,recent=6,block=2)", "streaming(sink=2,window=10,block=2)"]
    specs += ["streaming(sink=0,window=34,block=2,kivi=4,residual=0)"]
    rotary = Rotary.of(32, 1024, device=elsewhere)
    pool = Pool(geometry, 2**20, SlotLayout(geometry, 20, True), 1, 64, elsewhere)
    sessions: list[tuple[Cache, Lease]] = []
    for spec in specs:
        policy = parse(spec)
        layout = SlotLayout(geometry, 20, len(policy.states))
        lease = pool.lease(layout if policy.kivi is None else SlotLayout.of(geometry, policy, 20))
        assert lease is not None
        sessions.append((Cache(policy, rotary, lease.buffers(policy.states)), lease))
    runner = Runner(Reference(model))
    with OneDevice():
        for counts in ([10, 1, 3, 9, 10, 20], [1] * 5 + [12], [1, 14, 14, 8, 8, 3], [1] * 6):
            pieces = []
            for (cache, lease), count in zip(sessions, counts, strict=True):
                cache.begin_segment(count)
                pieces.append(Piece([5] * count, cache, lease, logits=True))
            logits = runner.run(pieces)
            assert (logits.device, logits.shape) == (elsewhere, (6, 259))
            for cache, _ in sessions:
                cache.end_segment()
    assert [cache.seen for cache, _ in sessions] == [13, 17, 19, 19, 20, 36]
    assert sessions[5][0].packed == 30
    assert all(cache.evicted > 0 for cache, _ in sessions[1:])


def test_the_guard_of_the_test_above_works() -> None:
    mixing: list[Callable[[], object]] = [
        lambda: torch.ones(2, device="meta").index_select(0, torch.tensor([1])),
        lambda: torch.ones(2, device="meta") + torch.ones(2),
    ]
    for operation in mixing:
        with OneDevice(), pytest.raises(AssertionError, match="mixes"):
            operation()
