"""The engine against the model's own `generate`, and batched against alone, on the real default model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from apiary_server.engine.engine import Engine
from apiary_server.model.runner import Piece, Runner
from apiary_server.sessions.session import Session
from apiary_server.sessions.transaction import Transaction
from apiary_server.settings import Settings
from apiary_server.worker import build
from tests.server.driver import Reader, ask, begin, create, request, run, step
from tests.server.driver import session as record

pytestmark = [pytest.mark.model, pytest.mark.timeout(400)]

PROMPTS = [
    "Tell me about honeybees.",
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain photosynthesis to a child in three sentences.",
    "List five uses of copper.",
    "Why is the sky blue? " * 12,
    "Translate to Spanish: The weather is nice today.",
    "Continue: once upon a time in a small village by the river",
]
TOKENS = 64


@pytest.fixture(scope="module")
def engine(default_model: Path) -> Engine:
    return build(Settings.load(model=str(default_model), threads=1, cache_budget="1GiB"))


@pytest.fixture(scope="module")
def expected(default_model: Path) -> list[tuple[list[int], list[int]]]:
    """Prompt ids and greedy continuation of each prompt, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(default_model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(default_model)
    pairs = []
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(
            **ids, do_sample=False, min_new_tokens=TOKENS, max_new_tokens=TOKENS, eos_token_id=None
        )
        prompt_ids = ids["input_ids"][0].tolist()
        pairs.append((prompt_ids, output[0, len(prompt_ids) :].tolist()))
    return pairs


def test_full_equals_generate_alone(engine: Engine, expected: list[tuple[list[int], list[int]]]) -> None:
    for prompt, (ids, continuation) in zip(PROMPTS, expected, strict=True):
        reader = ask(engine, [("user", prompt)], policy="full(bound=1024)", max_tokens=TOKENS)
        assert reader.usage.prompt_tokens == len(ids)
        assert reader.token_ids == continuation


def test_full_equals_generate_batched_with_others_joining_and_leaving(
    engine: Engine, expected: list[tuple[list[int], list[int]]]
) -> None:
    readers: list[Reader] = []
    passers: list[Reader] = []
    for i, prompt in enumerate(PROMPTS):
        readers.append(
            begin(engine, request([("user", prompt)], policy="full(bound=1024)", max_tokens=TOKENS))
        )
        passers.append(begin(engine, request(f"Number {i} is", max_tokens=3 + 5 * i)))
        step(engine, 2)
    passers[-1].close()
    run(engine, *readers, *passers)
    for reader, (_, continuation) in zip(readers, expected, strict=True):
        assert reader.token_ids == continuation


def test_a_prompt_beyond_the_trained_length_needs_no_more_memory(engine: Engine) -> None:
    ids = engine.tokenize(request("The bees of the apiary fly out at dawn, and at dusk they return. ").input)  # type: ignore[arg-type]
    create(engine, "long")
    for _ in range(2):  # the second overwrites what the first committed: it takes a second slot
        ask(engine, (ids * 300)[:700], "long", max_tokens=2)
    peak = engine.capacity().peak_bytes
    reader = ask(engine, (ids * 1000)[:12_000], "long", max_tokens=4)
    assert engine.capacity().peak_bytes == peak
    assert reader.usage.prompt_tokens == 12_000
    assert len(reader.token_ids) == 4
    assert record(engine, "long").cache is not None
    assert engine.sessions.get("default", "long").entries <= 564
    assert engine.sessions.get("default", "long").token_count == 13_408
    engine.keeper.delete("default", "long")
    step(engine)


class Forced:
    """A session whose every token is given: its caches can be compared, whatever the batch."""

    def __init__(self, engine: Engine, policy: str, tokens: Sequence[int], prompt: int) -> None:
        chosen, layout = engine.sessions._layout(policy)
        self.session = Session(id="", tenant="", policy=chosen, layout=layout)
        self.transaction = Transaction(self.session, engine._loop.residency, engine._door._rotary)
        self.tokens, self.prompt = tokens, prompt
        self.logits: list[torch.Tensor] = []
        assert self.transaction.open()

    def piece(self) -> Piece | None:
        done = self.transaction.cache.seen
        if done == len(self.tokens):
            return None
        count = self.prompt if done < self.prompt else 1
        assert self.transaction.begin_segment(count, prompt=done < self.prompt) == count
        return Piece(
            self.tokens[done : done + count], self.transaction.cache, self.transaction.place, logits=True
        )

    @staticmethod
    def step(runner: Runner, sessions: Sequence[Forced]) -> bool:
        pieces = [(session, piece) for session in sessions if (piece := session.piece()) is not None]
        if pieces:
            logits = runner.run([piece for _, piece in pieces])
            for (session, _), line in zip(pieces, logits, strict=True):
                session.logits.append(line.clone())
                session.transaction.end_segment()
        return bool(pieces)

    def kept(self) -> torch.Tensor:
        cache = self.transaction.cache
        return cache.buffers.position[:, :, : cache.n].clone()


@torch.inference_mode()
def test_buzz_batched_agrees_with_alone(engine: Engine) -> None:
    """Teacher-forced: logits within 1e-3, the same argmax unless the top two are within 2e-3, and the same
    kept entries unless a cell's scores are a near tie."""
    policies = [
        "buzz(sink=4,window=16,threshold=48)",
        "buzz(sink=4,window=16,threshold=48,positions=original)",
        "buzz2(sink=4,window=16,hot=30,cells=18)",
    ]
    text = " ".join(PROMPTS) * 2
    ids = engine.tokenize(request(text).input)  # type: ignore[arg-type]
    cases = [(policies[i % 3], ids[i * 17 : i * 17 + 100 + 20 * i], 30 + 20 * i) for i in range(6)]
    alone = []
    for case in cases:
        session = Forced(engine, *case)
        while Forced.step(engine._loop.runner, [session]):
            pass
        alone.append((session.logits, session.kept()))
        assert session.transaction.cache.evicted > 0
        session.transaction.rollback()
    together = [Forced(engine, *case) for case in cases]
    while Forced.step(engine._loop.runner, together):
        pass
    differing = total = 0
    for session, (logits, kept) in zip(together, alone, strict=True):
        for here, there in zip(session.logits, logits, strict=True):
            assert float((here - there).abs().max()) < 1e-3
            first, second = here.topk(2).values.tolist()
            assert int(here.argmax()) == int(there.argmax()) or first - second < 2e-3
        differing += int((session.kept() != kept).sum())
        total += kept.numel()
        session.transaction.rollback()
    assert differing <= total * 1e-3, "only near ties may fall out differently"
