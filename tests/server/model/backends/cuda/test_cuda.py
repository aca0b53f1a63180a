"""The backend against the models' own modules, session by session."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import embedding, silu
from transformers import LlamaForCausalLM

from apiary_server.engine.engine import Engine
from apiary_server.model import loader
from apiary_server.model.attention import Batch
from apiary_server.model.backends import cuda
from apiary_server.model.backends.cuda import Cuda
from apiary_server.model.backends.cuda.graphs import Capture, Compute
from apiary_server.model.backends.reference import NAME
from apiary_server.model.decoder import Decoder, ForeignStructure, Layer
from apiary_server.model.operations import Norm, Operations
from apiary_server.model.runner import Piece, Runner
from apiary_server.sessions.pool import Lease
from buzz import Cache
from tests import tiny
from tests.server.driver import begin, create, request, run
from tests.server.model.backends.cuda.fake_gpu import NoWaiting, fake_gpu
from tests.server.model.backends.cuda.recorder import Recorder
from tests.server.model.test_decoder import FAMILY, logits_of, model_of
from tests.server.model.test_runner import Worker, tokens_of

Session = tuple[Cache, Lease]
POLICIES = [
    "full(bound=96)",
    "window(window=20,block=2)",
    "streaming(sink=2,window=20,block=4)",
    "h2o(heavy=10,recent=10,block=4)",
    "buzz(sink=2,window=8,threshold=20)",
    "buzz(sink=2,window=8,threshold=20,accumulate=false,positions=original)",
    "buzz(sink=2,window=8,threshold=20,log_n=16)",
    "buzz2(sink=2,window=6,hot=8,cells=8,horizon=9,block=4)",
    "corm(budget=30,recent=8,queries=4,block=5)",
    "cascade(sink=3,cascades=3,size=9,block=4)",
    "elastic(sink=3,heavy=20,recent=2,distance=6,block=5)",
]
FAKED = [POLICIES[0], *POLICIES[6:10], POLICIES[8]]  # all kinds of states, and none
PACKED = [
    "h2o(heavy=40,recent=40,block=8,kivi=4,residual=16)",
    "buzz(sink=4,window=36,threshold=40,kivi=2,residual=16)",
]


@pytest.fixture
def model(device: torch.device) -> LlamaForCausalLM:
    """In float64, so that sums in another order differ by nothing that matters."""
    return llama(device)


def llama(device: torch.device, **changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny.config(**changes)).eval().double().to(device)
    model.set_attn_implementation(NAME)
    return model


class Pair:
    """The same sessions on the backend and on the model's own modules."""

    def __init__(self, model: LlamaForCausalLM, capture: Capture) -> None:
        self.ours, self.theirs = Worker(model), Worker(model)
        self.ours.runner = Runner(Cuda(model, capture))
        self.sessions: list[tuple[Session, Session]] = []

    def open(self, policy: str, *, workspace: bool = False) -> int:
        one, other = (worker.session(policy, workspace=workspace) for worker in (self.ours, self.theirs))
        self.sessions.append((one, other))
        return len(self.sessions) - 1

    def step(self, tokens: dict[int, list[int]]) -> None:
        """Give sessions tokens, and compare what comes out and what is kept."""
        parts = list(tokens.values())
        found, expected = (
            worker.step([self.sessions[number][side] for number in tokens], parts)
            for side, worker in enumerate((self.ours, self.theirs))
        )
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        for number in tokens:
            (one, _), (other, _) = self.sessions[number]
            assert one.state() == other.state()
            n = one.n
            assert torch.equal(one.buffers.position[..., :n], other.buffers.position[..., :n])
            for name, state in one.buffers.state.items():
                theirs = other.buffers.state[name]
                torch.testing.assert_close(state[..., :n], theirs[..., :n], atol=1e-3, rtol=1e-3)


def test_sessions_that_come_and_go(model: LlamaForCausalLM, capture: Capture) -> None:
    """Of all policies, in neighbouring slots, scattered ones and workspaces; prompts beside tokens."""
    generator, pair = random.Random(0), Pair(model, capture)
    policies = POLICIES * 2
    generator.shuffle(policies)
    for place, policy in enumerate(policies):
        pair.open(policy, workspace=place in (3, 8))
    pair.step({i: tokens_of(i, 15) for i in range(len(policies))})
    for step in range(50):
        active = [i for i in range(len(policies)) if generator.random() < 0.6]
        generator.shuffle(active)
        counts = {i: 1 if generator.random() < 0.9 else generator.randint(2, 9) for i in active}
        pair.step({i: tokens_of(100 * step + i, count) for i, count in counts.items()})
    assert all(one.evicted for (one, _), _ in pair.sessions if one.policy.evicts)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_recorded_step_serves_any_slots_and_lengths(policy: str) -> None:
    recorder = Recorder()
    pair = Pair(llama(torch.device("cpu")), recorder)
    for seed in range(7):
        pair.step({pair.open(policy): tokens_of(seed, 2 + 3 * seed)})
    generator = random.Random(1)
    for step in range(40):
        active = generator.sample(range(7), generator.choice([5, 6, 7]))
        pair.step({i: tokens_of(100 * step + i, 1) for i in active})
    assert [(graph.runs, graph.replays) for graph in recorder.graphs] == [(40, 39)]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
def test_nothing_but_the_new_entries_is_written(
    model: LlamaForCausalLM, capture: Capture, count: int
) -> None:
    """Rows that only fill a step up leave no trace, in memory that is NaN where nobody wrote."""
    worker = Worker(model)
    worker.runner = Runner(Cuda(model, capture))
    sessions = [worker.session("h2o(heavy=60,recent=20,block=4)") for _ in range(10)]
    worker.step(sessions, [tokens_of(i, 4 + i) for i in range(10)])
    chosen, slots = sessions[-count:], sessions[0][1].slots
    written = {lease.index: cache.n for cache, lease in chosen}
    for step in range(3):
        before = slots.memory.clone()
        keys = bits(slots.keys)
        logits = worker.step(chosen, [tokens_of(step, 1)] * count)
        assert logits.isfinite().all()
        slots_changed = (slots.memory != before).any(dim=1)
        assert slots_changed.nonzero().flatten().tolist() == sorted(written)
        entries_changed = (bits(slots.keys) != keys).any(dim=-1).any(dim=2).all(dim=1)
        assert entries_changed.nonzero().tolist() == [[i, n + step] for i, n in sorted(written.items())]


def bits(tensor: Tensor) -> Tensor:
    """A copy in which NaN equals itself."""
    return tensor.clone().view(torch.int64)


class Uncaptured(Cuda):
    """The same decoder on the path that is common to all backends."""

    def forward(self, tokens: Tensor, positions: Tensor, keep: Tensor, batch: Batch) -> Tensor:
        return self._decoder.forward(tokens, positions, keep, batch)


@pytest.mark.parametrize("policy", PACKED)
def test_quantised_sessions_run_beside_the_others(
    device: torch.device, capture: Capture, policy: str
) -> None:
    model = llama(device, head_dim=32)
    pair = Pair(model, capture)
    pair.theirs.runner = Runner(Uncaptured(model, capture))  # its own modules may round to other codes
    for seed in range(3):
        pair.step({pair.open(policy): tokens_of(seed, 10 + 15 * seed)})
        pair.step({pair.open("h2o(heavy=40,recent=40,block=8)"): tokens_of(seed, 20)})
    for step in range(80):
        pair.step({i: tokens_of(100 * step + i, 1) for i in range(6)})
    assert all(one.packed for (one, _), _ in pair.sessions[::2])


def test_only_the_rows_that_are_asked_for_get_logits(model: LlamaForCausalLM, capture: Capture) -> None:
    pair = Pair(model, capture)
    for seed, policy in enumerate(POLICIES[:5]):
        pair.step({pair.open(policy): tokens_of(seed, 3 + seed)})
    for _ in range(3):
        found = []
        for side, worker in enumerate((pair.ours, pair.theirs)):
            pieces = []
            for number, count in enumerate([1, 4, 1, 2, 1]):
                cache, lease = pair.sessions[number][side]
                cache.begin_segment(count)
                pieces.append(Piece(tokens_of(number, count), cache, lease, logits=number in (4, 0, 3)))
            found.append(worker.runner.run(pieces))
        assert found[0].shape == (3, 259)
        torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize(
    ("dtype", "within"), [(torch.float32, 1e-4), (torch.bfloat16, 0.2), (torch.float16, 0.03)]
)
def test_dtypes(
    device: torch.device, capture: Capture, dtype: torch.dtype, cache_dtype: torch.dtype, within: float
) -> None:
    """Nothing is evicted here: narrow scores may keep others."""
    model = llama(device).to(dtype)
    pair = [Worker(model, cache_dtype) for _ in range(2)]
    pair[0].runner = Runner(Cuda(model, capture))
    sessions = [[worker.session(policy) for policy in POLICIES[3:8]] for worker in pair]
    for counts in ([5, 1, 3, 1, 9], [1] * 5, [1] * 5, [1] * 5):
        tokens = [tokens_of(i, count) for i, count in enumerate(counts)]
        found, expected = (worker.step(some, tokens) for worker, some in zip(pair, sessions, strict=True))
        assert found.dtype == dtype
        assert float((found - expected).abs().max()) <= within * float(expected.abs().max())


@pytest.mark.parametrize("name", FAMILY)
def test_models_of_the_family(name: str) -> None:
    config = FAMILY[name]()
    model = model_of(config)
    found = logits_of(Cuda(model, Recorder()).forward, config)
    expected = logits_of(Decoder.of(model, Operations()).forward, config)
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))


def test_few_steps_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three sizes in turn two, and what is forgotten is gone."""
    made: list[weakref.ref[Compute]] = []

    def capture(compute: Compute) -> Compute:
        recorded = Recorder()(compute)
        made.append(weakref.ref(recorded))
        return recorded

    monkeypatch.setattr(cuda, "_STEPS", 2)
    pair = Pair(llama(torch.device("cpu")), capture)
    for seed in range(4):
        pair.step({pair.open(POLICIES[4]): tokens_of(seed, 5)})
    alive = []
    for count in (1, 2, 4, 2, 1, 1):
        pair.step({i: tokens_of(i, 1) for i in range(count)})
        alive.append([number for number, recorded in enumerate(made) if recorded() is not None])
    assert alive == [[0], [0, 1], [1, 2], [1, 2], [1, 3], [1, 3]]


def test_long_caches_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apiary_server.model.backends.cuda.attention._GATHERED", 3 * 2 * 8 * 96)
    pair = Pair(llama(torch.device("cpu")), Recorder())
    for seed in range(7):
        pair.step({pair.open(POLICIES[8]): tokens_of(seed, 2 + seed)})
    for step in range(5):
        pair.step({i: tokens_of(10 * step + i, 1) for i in range(7)})


def test_the_longest_session_says_how_far_a_step_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_longest", lambda most: -(-most // 8) * 8)
    recorder = Recorder()
    pair = Pair(llama(torch.device("cpu")), recorder)
    for count in (2, 20, 38, 11, 29):
        pair.step({pair.open(POLICIES[0]): tokens_of(count, count)})
    for step in range(12):
        pair.step({i: tokens_of(10 * step + i, 1) for i in (4, 0, 2)})  # slots that are no neighbours
    assert [(graph.runs, graph.replays) for graph in recorder.graphs] == [(2, 1), (8, 7), (2, 1)]


def test_turns_of_an_engine(monkeypatch: pytest.MonkeyPatch, make_engine: Callable[..., Engine]) -> None:
    """The loader takes the backend, and conversations that share steps go as they do elsewhere."""
    recorder, answers = Recorder(), []
    elsewhere = make_engine(start=False)
    with monkeypatch.context() as patch:
        patch.setattr(loader, "choose", lambda kind, weights, model: Cuda(model, recorder))
        here = make_engine(start=False)
    loaded = len(recorder.graphs)
    assert [(graph.runs, graph.replays) for graph in recorder.graphs] == [(3, 2)], "the loader's own check"
    for engine in (elsewhere, here):
        for id, policy in zip("abcd", POLICIES[3:7], strict=True):
            create(engine, id, policy)
        for turn in range(3):
            some = [begin(engine, request(id * (5 + turn), id, max_tokens=20)) for id in "abcd"]
            run(engine, *some)
            answers.append([reader.token_ids for reader in some])
    assert answers[:3] == answers[3:]
    assert sum(graph.replays for graph in recorder.graphs[loaded:]) > 50


def test_sizes() -> None:
    padded = [cuda._padded(count) for count in range(1, 65)]
    assert sorted(set(padded)) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]
    assert all(count <= size for count, size in enumerate(padded, 1))
    longest = [cuda._longest(most) for most in range(1, 2**15)]
    assert len(set(longest)) == 24
    assert all(most <= size < most + max(256, most / 4 + 1) for most, size in enumerate(longest, 1))


def test_a_gpu_is_needed() -> None:
    with pytest.raises(ForeignStructure, match="computes on a GPU, and not on cpu"):
        Cuda(llama(torch.device("cpu")))


class FakeLlama:
    """What there is to know of the tiny model, without values."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.config, self.model, self.rotary_emb = tiny.config(), self, self
        self.inv_freq = torch.empty(4, device=device)

    @property
    def decoder(self) -> Decoder:
        do, config = Operations(), self.config
        norm, hidden, inner = Norm(self.weight(32), 1e-5), config.hidden_size, config.intermediate_size
        layer = Layer(
            attention_norm=norm,
            qkv=do.linear(self.weight(8 * 8, hidden), None),
            q_norm=Norm(self.weight(8), 1e-5),
            k_norm=Norm(self.weight(8), 1e-5),
            output=do.linear(self.weight(hidden, 4 * 8), self.weight(hidden)),
            mlp_norm=norm,
            gate_up=do.linear(self.weight(2 * inner, hidden), None),
            down=do.linear(self.weight(hidden, inner), None),
        )
        embed, head = partial(embedding, weight=self.weight(259, hidden)), self.weight(259, hidden)
        return Decoder(
            embed, [layer] * 2, norm, do.linear(head, None), silu, 4, 2, 8, 0.3, self.inv_freq, 1.0, do
        )

    def weight(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)


def test_no_captured_step_waits_or_leaves_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a fake GPU: this proves shapes, dtypes and devices, and that no value is looked at."""
    monkeypatch.setattr("buzz.compaction._astray", lambda *_: None)
    watched = []

    def capture(compute: Compute) -> Compute:
        def run() -> Tensor:
            with NoWaiting():
                output = compute()
            watched.append((output.device, output.dtype, tuple(output.shape)))
            return output

        return run

    with fake_gpu() as gpu, torch.inference_mode():
        model = FakeLlama(gpu, torch.bfloat16)
        monkeypatch.setattr(Decoder, "of", lambda *_: model.decoder)
        worker = Worker(model, torch.float16)  # type: ignore[arg-type]
        worker.runner = Runner(Cuda(model, capture))  # type: ignore[arg-type]
        sessions = [worker.session(policy) for policy in FAKED]
        for counts in ([9] * len(FAKED), [1] * len(FAKED), [1, 30] * 3):
            logits = worker.step(sessions, [tokens_of(0, count) for count in counts])
            assert (logits.device, logits.dtype, logits.shape) == (gpu, torch.bfloat16, (len(FAKED), 259))
    assert len(watched) > 6
    assert {(device, dtype) for device, dtype, _ in watched} == {(gpu, torch.bfloat16)}
    assert {shape for *_, shape in watched} == {(1, 32), (2, 32)}
