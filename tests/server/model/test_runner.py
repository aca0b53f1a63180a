"""Packing: whatever shares a forward pass, each session gets what it gets alone."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from apiary_server.model.backends import Reference
from apiary_server.model.backends.reference import NAME
from apiary_server.model.runner import Piece, Runner
from apiary_server.sessions.pool import Geometry, Lease, Pool, SlotLayout
from buzz import Cache, Rotary, parse
from tests import tiny

CAPACITY = 96
POLICIES = [
    "full(bound=96)",
    "buzz(sink=2,window=8,threshold=20)",
    "buzz(sink=2,window=8,threshold=20,positions=original)",
    "buzz(sink=2,window=8,threshold=20,log_n=16)",
    "streaming(sink=2,window=20,block=4)",
    "h2o(heavy=10,recent=10,block=4)",
]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """The tiny model in float64, so that sums in another order differ by nothing that matters."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny.config()).eval().double()
    model.set_attn_implementation(NAME)
    return model


@pytest.fixture(scope="module")
def wide_model() -> LlamaForCausalLM:
    """With heads that can be quantised."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny.config(head_dim=32)).eval().double()
    model.set_attn_implementation(NAME)
    return model


class Worker:
    """A pool whose unused memory is garbage, and a runner."""

    def __init__(self, model: LlamaForCausalLM, dtype: torch.dtype = torch.float64) -> None:
        self.geometry = Geometry(2, 2, model.config.head_dim, dtype)
        self.rotary = Rotary(model.model.rotary_emb.inv_freq.detach().clone(), 1024)
        default = SlotLayout(self.geometry, CAPACITY, states=1)
        self.pool = Pool(self.geometry, 8 * 2**20, default, 3, 2 * CAPACITY, model.device)
        self.pool._arena.fill_(0xFF)  # NaN in every dtype
        self.runner = Runner(Reference(model))

    def session(self, policy: str, *, workspace: bool = False) -> tuple[Cache, Lease]:
        chosen = parse(policy)
        layout = SlotLayout(self.geometry, CAPACITY, len(chosen.states))
        if chosen.kivi is not None:
            layout = SlotLayout.of(self.geometry, chosen, CAPACITY - chosen.bound)
        lease = self.pool.lease_workspace() if workspace else self.pool.lease(layout)
        assert lease is not None
        return Cache(chosen, self.rotary, lease.buffers(chosen.states)), lease

    def step(self, sessions: Sequence[tuple[Cache, Lease]], tokens: Sequence[Sequence[int]]) -> Tensor:
        """One forward pass in which each session takes its tokens as a segment."""
        for (cache, _), some in zip(sessions, tokens, strict=True):
            cache.begin_segment(len(some))
        logits = self.runner.run(
            [
                Piece(some, cache, lease, logits=True)
                for (cache, lease), some in zip(sessions, tokens, strict=True)
            ]
        )
        for cache, _ in sessions:
            cache.end_segment()
        return logits


def tokens_of(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(3, 259), k=count)


@pytest.mark.parametrize("seed", range(3))
def test_mixed_batches_equal_alone(model: LlamaForCausalLM, seed: int) -> None:
    """Sessions of all policies, in neighbouring slots, scattered slots and workspaces, join and leave."""
    generator = random.Random(seed)
    worker = Worker(model)
    policies = [generator.choice(POLICIES) for _ in range(8)] + POLICIES
    generator.shuffle(policies)
    batched = []
    for place, policy in enumerate(policies):
        gap = worker.session(policy)[1] if generator.random() < 0.3 else None
        batched.append(worker.session(policy, workspace=place in (2, 7)))
        if gap is not None:
            gap.release()
    cuts = [[generator.randint(2, 40), *[1] * 12, generator.randint(1, 20), *[1] * 6] for _ in policies]
    streams = [tokens_of(seed * 100 + i, sum(cut)) for i, cut in enumerate(cuts)]

    alone = []
    for policy, cut, stream in zip(policies, cuts, streams, strict=True):
        own = Worker(model)
        session, lines, done = own.session(policy), [], 0
        for count in cut:
            lines.append(own.step([session], [stream[done : done + count]])[0])
            done += count
        alone.append((lines, session[0]))

    places = [0] * len(policies)
    done_by = [0] * len(policies)
    while any(place < len(cut) for place, cut in zip(places, cuts, strict=True)):
        active = [i for i, cut in enumerate(cuts) if places[i] < len(cut) and generator.random() < 0.8]
        generator.shuffle(active)
        if not active:
            continue
        parts = [streams[i][done_by[i] : done_by[i] + cuts[i][places[i]]] for i in active]
        logits = worker.step([batched[i] for i in active], parts)
        assert torch.isfinite(logits).all()
        for i, part, line in zip(active, parts, logits, strict=True):
            torch.testing.assert_close(line, alone[i][0][places[i]], atol=1e-4, rtol=0)
            places[i] += 1
            done_by[i] += len(part)
    for (cache, _), (_, other) in zip(batched, alone, strict=True):
        assert cache.state() == other.state()
        kept, expected = (c.buffers.position[:, :, : c.n] for c in (cache, other))
        assert torch.equal(kept, expected)


@pytest.mark.parametrize("bits", [2, 4])
def test_quantised_sessions_in_a_batch_equal_alone(wide_model: LlamaForCausalLM, bits: int) -> None:
    """In neighbouring slots, with other counts of entries, quantised or not, and before and after a change
    of positions."""
    policies = [
        f"h2o(heavy=40,recent=40,block=8,kivi={bits},residual=16)",
        f"buzz(sink=4,window=36,threshold=40,kivi={bits},residual=16)",
        f"h2o(heavy=70,recent=10,block=8,kivi={bits},residual=16,positions=original)",
    ]
    worker, together, alone = Worker(wide_model), [], []
    for i, policy in enumerate(policies * 2):
        together.append((worker, worker.session(policy)))
        own = Worker(wide_model)
        alone.append((own, own.session(policy)))
        for place in (worker, own):
            place.rotary = Rotary(place.rotary.inv_freq, 150)
        prompt = tokens_of(i, 5 + 11 * i)
        for at, session in (together[i], alone[i]):
            session[0].rotary = at.rotary
            while prompt and session[0].seen < len(prompt):
                at.step([session], [prompt[session[0].seen :][: session[0].room]])
    pool_class = {session[1].slots.layout for _, session in together}
    assert len(pool_class) == 1
    runs = set()
    for i in range(130):
        batch = [session for _, session in together]
        parts = [[3 + (7 * i + k) % 250] for k in range(len(batch))]
        runs.add(tuple(cache.packed > 0 for cache, _ in batch))
        lines = worker.step(batch, parts)
        for line, part, (own, session), (cache, _) in zip(lines, parts, alone, batch, strict=True):
            torch.testing.assert_close(line, own.step([session], [part])[0], atol=1e-5, rtol=0)
            assert session[0].state() == cache.state()
    assert len(runs) > 2
    assert all(cache.rotated_in_cache and cache.packed for cache, _ in batch)


def test_the_order_of_pieces_changes_nothing(model: LlamaForCausalLM) -> None:
    counts = [5, 1, 1, 9, 1, 30, 1, 2]
    results = []
    for order in (list(range(8)), [7, 2, 5, 0, 1, 6, 3, 4], list(reversed(range(8)))):
        worker = Worker(model)
        sessions = [worker.session(POLICIES[i % len(POLICIES)]) for i in range(8)]
        worker.step(sessions, [tokens_of(i, 6) for i in range(8)])
        parts = [tokens_of(10 + i, counts[i]) for i in range(8)]
        logits = worker.step([sessions[i] for i in order], [parts[i] for i in order])
        results.append(torch.stack([logits[order.index(i)] for i in range(8)]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_only_the_pieces_that_ask_get_logits_in_their_order(model: LlamaForCausalLM) -> None:
    parts = [tokens_of(i, count) for i, count in enumerate([4, 1, 3, 1, 1])]
    everything, some, none = (Worker(model) for _ in range(3))
    whole = everything.step([everything.session(POLICIES[i]) for i in range(5)], parts)

    def run(worker: Worker, asking: set[int]) -> Tensor:
        pieces = []
        for i, part in enumerate(parts):
            cache, lease = worker.session(POLICIES[i])
            cache.begin_segment(len(part))
            pieces.append(Piece(part, cache, lease, logits=i in asking))
        return worker.runner.run(pieces)

    torch.testing.assert_close(run(some, {3, 0, 2}), whole[[0, 2, 3]])
    assert run(none, set()).shape == (0, 259)


@pytest.mark.parametrize("slots", [[0, 1, 2, 3], [0, 2, 3, 5], [1, 3, 5], [4]])
def test_decode_runs_over_neighbours_and_scattered_slots(model: LlamaForCausalLM, slots: list[int]) -> None:
    worker, reference = Worker(model), own_attention(model)
    sessions = [worker.session("buzz(sink=2,window=60,threshold=20)") for _ in range(6)]
    prompts = [tokens_of(i, 3 + 7 * i) for i in range(6)]
    worker.step(sessions, prompts)
    logits = worker.step([sessions[i] for i in slots], [[50 + i] for i in slots])
    for i, line in zip(slots, logits, strict=True):
        expected = reference(torch.tensor([[*prompts[i], 50 + i]])).logits[0, -1]
        torch.testing.assert_close(line, expected, atol=1e-9, rtol=0)
    assert [sessions[i][0].seen for i in range(6)] == [len(prompts[i]) + (i in slots) for i in range(6)]


def own_attention(model: LlamaForCausalLM) -> LlamaForCausalLM:
    copied = LlamaForCausalLM(tiny.config()).eval().double()
    copied.load_state_dict(model.state_dict())
    copied.set_attn_implementation("sdpa")  # eager takes its softmax in float32
    return copied


@pytest.mark.parametrize("cut", [[60], [1] * 60, [7, 1, 1, 30, 20, 1]])
def test_a_full_cache_equals_the_model(model: LlamaForCausalLM, cut: list[int]) -> None:
    worker, tokens = Worker(model), tokens_of(5, 60)
    session, done = worker.session("full(bound=96)"), 0
    expected = own_attention(model)(torch.tensor([tokens])).logits[0]
    for count in cut:
        line = worker.step([session], [tokens[done : done + count]])[0]
        done += count
        torch.testing.assert_close(line, expected[done - 1], atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "within"), [(torch.float32, 1e-4), (torch.bfloat16, 0.25), (torch.float16, 0.05)]
)
@pytest.mark.parametrize("policy", POLICIES)
def test_narrow_caches(model: LlamaForCausalLM, policy: str, dtype: torch.dtype, within: float) -> None:
    exact, narrow = Worker(model), Worker(model, dtype)
    sessions = [(worker, worker.session(policy)) for worker in (exact, narrow)]
    for count in (16, 1, 1):  # nothing is evicted yet, so both keep the same
        tokens = [tokens_of(count, count), tokens_of(count + 1, 1)]
        lines = [worker.step([session, worker.session(policy)], tokens)[0] for worker, session in sessions]
        assert float((lines[0] - lines[1]).abs().max()) < within * float(lines[0].abs().max())
    assert not sessions[0][1][0].evicted


def test_a_forward_pass_that_fails_leaves_the_counts(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(model)
    session = worker.session("buzz(sink=2,window=8,threshold=20)")
    worker.step([session], [tokens_of(0, 9)])
    before = session[0].state()
    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[1], "forward", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            worker.step([session], [[7]])
    assert session[0].state() == before
    control = Worker(model)
    other = control.session("buzz(sink=2,window=8,threshold=20)")
    control.step([other], [tokens_of(0, 9)])
    assert torch.equal(worker.step([session], [[8]]), control.step([other], [[8]]))
