"""The scheduler in a simulation: a virtual clock, counters for turns, memory that comes and goes."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest

from apiary_server.engine.scheduler import Scheduler


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(eq=False)
class Memory:
    """Slots for turns, one workspace for prompts that are long."""

    slots: int
    held: int = 0
    workspace: Any = None


@dataclass(eq=False)
class FakeTurn:
    """What the scheduler may see of a turn."""

    tenant: str
    prompt: int
    output: int
    arrived: float
    memory: Memory
    priority: int = 0
    computed: int = 0
    segment_end: int = 0
    known: int = 0
    paused: bool = False
    started: float | None = None
    finished: float | None = None
    steps: list[float] = field(default_factory=list)
    replaying: bool = False
    starved: bool = False

    def __post_init__(self) -> None:
        self.known = self.prompt

    @property
    def decoding(self) -> bool:
        return self.computed >= self.prompt

    @property
    def remaining(self) -> int:
        return self.known - self.computed

    @property
    def tokens(self) -> range:
        return range(self.known)

    def open(self) -> bool:
        if self.memory.held == self.memory.slots:
            return False
        self.memory.held += 1
        return True

    def begin_segment(self) -> bool:
        if self.computed < self.segment_end:
            return True
        left = (self.prompt if self.computed < self.prompt else self.known) - self.computed
        if left > 100:
            if self.memory.workspace not in (None, self):
                return False
            self.memory.workspace = self
            left = min(left, 400)
        self.segment_end += left
        return True

    def advance(self, count: int) -> None:
        self.computed += count
        if self.computed == self.segment_end and self.memory.workspace is self:
            self.memory.workspace = None
        if self.computed == self.known:
            self.known += 1


def simulate(seed: int) -> tuple[list[FakeTurn], int]:
    """Random arrivals of three tenants on a small worker, until all are served. Returns the turns."""
    chance, clock = random.Random(seed), Clock()
    memory = Memory(slots=chance.randint(1, 8))
    most = chance.randint(1, 8)
    scheduler = Scheduler(step_tokens=64, max_running=most, clock=clock)
    turns = [
        FakeTurn(
            tenant=chance.choice("abc"),
            prompt=chance.choice([1, 20, 90, 500, 3000]),
            output=chance.randint(1, 40),
            arrived=chance.uniform(0, 20),
            memory=memory,
            priority=chance.choice([0, 0, 0, 5, -5]),
        )
        for _ in range(chance.randint(1, 40))
    ]
    coming = sorted(turns, key=lambda turn: turn.arrived)
    for step in range(20_000):
        while coming and coming[0].arrived <= clock.now:
            scheduler.add(coming.pop(0))  # type: ignore[arg-type]
        decoding = [turn for turn in scheduler.running if turn.decoding]
        plan = scheduler.schedule()
        assert len(scheduler.running) <= min(memory.slots, most)
        chunks = [(chunk.turn, chunk.count) for chunk in plan.chunks]
        assert all((turn, 1) in chunks for turn in decoding), "decode tokens are in every step"
        assert len({id(turn) for turn, _ in chunks}) == len(chunks), "a turn is scheduled once a step"
        assert plan.prefill_tokens + plan.decode_tokens == sum(count for _, count in chunks)
        assert plan.prefill_tokens <= max(0, 64 - plan.decode_tokens)
        for turn, count in chunks:
            assert isinstance(turn, FakeTurn)
            assert 1 <= count <= turn.segment_end - turn.computed
            turn.steps.append(clock.now)
            turn.advance(count)
            if turn.known - turn.prompt >= turn.output:
                turn.finished = clock.now
                scheduler.remove(turn)  # type: ignore[arg-type]
                memory.held -= 1
        if not coming and not scheduler.running and not scheduler.waiting:
            return turns, step
        assert chunks or not (scheduler.running or scheduler.waiting), "work is left and nothing runs"
        clock.now += 0.05
    raise AssertionError(f"seed {seed}: somebody starves")


@pytest.mark.parametrize("block", range(10))
def test_a_thousand_random_loads_end_without_starvation(block: int) -> None:
    for seed in range(block * 100, block * 100 + 100):
        turns, _ = simulate(seed)
        assert all(turn.finished is not None for turn in turns)


def test_the_same_load_gives_the_same_schedule() -> None:
    first, again = simulate(5)[0], simulate(5)[0]
    assert [turn.steps for turn in first] == [turn.steps for turn in again]


def test_decoding_goes_on_beside_a_long_prefill() -> None:
    clock, memory = Clock(), Memory(slots=8)
    scheduler = Scheduler(step_tokens=64, max_running=8, clock=clock)
    decoders = [FakeTurn("a", 5, 100, 0.0, memory) for _ in range(4)]
    for turn in decoders:
        scheduler.add(turn)  # type: ignore[arg-type]
    for chunk in scheduler.schedule().chunks:
        chunk.turn.advance(chunk.count)  # type: ignore[attr-defined]
    long = FakeTurn("a", 4000, 1, 0.0, memory)
    scheduler.add(long)  # type: ignore[arg-type]
    steps = 0
    while not long.decoding:
        plan = scheduler.schedule()
        assert plan.decode_tokens == 4
        assert plan.prefill_tokens <= 60
        for chunk in plan.chunks:
            chunk.turn.advance(chunk.count)  # type: ignore[attr-defined]
        steps += 1
    assert steps == -(-4000 // 60) or steps <= 4000 // 60 + 11  # segments of 400 may end a chunk early


def served(weights: dict[str, float], rounds: int = 400) -> dict[str, int]:
    clock, memory = Clock(), Memory(slots=2)
    scheduler = Scheduler(step_tokens=32, max_running=2, weights=weights, clock=clock)
    tokens = {"big": 0, "small": 0}
    for _ in range(rounds):
        for tenant, many in (("big", 10), ("small", 1)):
            while sum(turn.tenant == tenant for turn in scheduler.waiting) < many:
                scheduler.add(FakeTurn(tenant, 50, 2, clock.now, memory))  # type: ignore[arg-type]
        for chunk in scheduler.schedule().chunks:
            turn: Any = chunk.turn
            tokens[turn.tenant] += chunk.count
            turn.advance(chunk.count)
            if turn.known - turn.prompt >= turn.output:
                scheduler.remove(turn)
                memory.held -= 1
        clock.now += 0.05
    return tokens


def test_tenants_share_fairly_however_much_one_asks() -> None:
    tokens = served({})
    assert tokens["big"] / tokens["small"] == pytest.approx(1, rel=0.1)


def test_weights_set_the_shares() -> None:
    tokens = served({"big": 3.0})
    assert tokens["big"] / tokens["small"] == pytest.approx(3, rel=0.15)


def test_priority_goes_first_and_waiting_catches_up() -> None:
    clock, memory = Clock(), Memory(slots=1)
    scheduler = Scheduler(step_tokens=64, max_running=1, clock=clock)
    low = FakeTurn("a", 5, 1, 0.0, memory, priority=0)
    high = FakeTurn("a", 5, 1, 0.0, memory, priority=10)
    scheduler.add(low)  # type: ignore[arg-type]
    scheduler.add(high)  # type: ignore[arg-type]
    assert scheduler.schedule().chunks[0].turn is high  # type: ignore[comparison-overlap]
    scheduler.remove(high)  # type: ignore[arg-type]
    memory.held = 0
    clock.now = 60.0
    late = FakeTurn("a", 5, 1, 60.0, memory, priority=10)
    scheduler.add(late)  # type: ignore[arg-type]
    assert scheduler.schedule().chunks[0].turn is low  # type: ignore[comparison-overlap]


def test_the_scheduler_needs_no_torch() -> None:
    code = "import apiary_server.engine.scheduler, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("after", [1.0, 30.0, 300.0])
def test_a_chats_next_turn_does_not_wait_behind_a_book(after: float) -> None:
    clock, memory = Clock(), Memory(slots=4)
    scheduler = Scheduler(step_tokens=64, max_running=4, clock=clock)
    book = FakeTurn("a", 20_000, 1, 0.0, memory)
    scheduler.add(book)  # type: ignore[arg-type]
    for chunk in scheduler.schedule().chunks:
        chunk.turn.advance(chunk.count)  # type: ignore[attr-defined]
    clock.now = after
    short = FakeTurn("a", 30, 1, after, memory)
    scheduler.add(short)  # type: ignore[arg-type]
    chunks = {id(chunk.turn): chunk.count for chunk in scheduler.schedule().chunks}
    assert chunks == {id(short): 30, id(book): chunks[id(book)]}
    assert chunks[id(book)] >= 32
