"""Parked slots come back as they were, however late the copies run."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from apiary_server import worker
from apiary_server.engine.engine import Engine
from apiary_server.sessions.parking import Copy, CudaCopies, Parking, PinnedParking, PlainParking, parking_of
from tests.server.driver import ask, create, step

KIB = 2**10


class LateCopies:
    """Copies that run in order, but no sooner than somebody waits; `hurry` is how likely one runs by itself
    when it is asked whether it is done."""

    def __init__(self, hurry: float = 0.0) -> None:
        self._hurry = hurry
        self._chance = random.Random(0)
        self.waiting: list[LateCopy] = []
        self.pinned: list[Tensor] = []
        self.unpinned = 0

    def pin(self, size: int) -> Tensor:
        self.pinned.append(torch.zeros(size, dtype=torch.uint8))
        return self.pinned[-1]

    def unpin(self) -> None:
        self.unpinned += 1

    def start(self, target: Tensor, source: Tensor) -> Copy:
        self.waiting.append(LateCopy(self, target, source))
        return self.waiting[-1]

    def run(self, last: LateCopy) -> None:
        """All up to one."""
        while last in self.waiting:
            copy = self.waiting.pop(0)
            copy.target.copy_(copy.source)

    def hurries(self) -> bool:
        return self._chance.random() < self._hurry


@dataclass(eq=False)
class LateCopy:
    copies: LateCopies
    target: Tensor
    source: Tensor

    def done(self) -> bool:
        if self.copies.hurries():
            self.wait()
        return self not in self.copies.waiting

    def wait(self) -> None:
        self.copies.run(self)

    join = wait


def filled(size: int, value: int) -> Tensor:
    return torch.full((size,), value, dtype=torch.uint8)


def test_plain_memory_is_copied_at_once() -> None:
    parking, slot = parking_of(torch.device("cpu"), KIB), filled(64, 7)
    assert type(parking) is PlainParking
    parked = parking.park(slot)
    parking.settle(slot.fill_(1))
    other = filled(64, 0)
    parking.unpark(parked, other)
    parking.forget(parked)
    assert torch.equal(other, filled(64, 7))


@pytest.mark.parametrize("hurry", [0.0, 0.5, 1.0])
def test_slots_that_move_about_keep_their_bytes(hurry: float) -> None:
    """Slots of two sizes overlap in one memory; whoever takes one settles it and writes to it."""
    copies, chance = LateCopies(hurry), random.Random(1)
    memory, budget = filled(12 * 64, 0), 9 * 64
    parking = PinnedParking(budget, copies)
    parked: list[tuple[Tensor, int]] = []
    for value in range(1, 250):
        size = chance.choice([2, 3]) * 64
        start = chance.randrange(0, len(memory) - size + 1, size)
        slot = memory[start : start + size]
        parking.settle(slot)
        slot.fill_(value)
        fitting = [entry for entry in parked if len(entry[0]) == size]
        if fitting and chance.random() < 0.5:
            entry = chance.choice(fitting)
            parking.unpark(entry[0], slot)
            assert torch.equal(slot, filled(size, entry[1]))
        elif sum(len(buffer) for buffer, _ in parked) + size <= budget:
            parked.append((parking.park(slot), value))
        if parked and chance.random() < 0.3:
            buffer, _ = parked.pop(chance.randrange(len(parked)))
            parking.forget(buffer)
        assert parking._pinned <= budget
        assert parking._pinned == sum(len(b) for b, _ in parked) + sum(len(b) for b in parking._free)
    assert copies.unpinned > 0
    assert len(copies.pinned) < 60, "of 250 slots most found a buffer"


def test_only_slots_that_are_being_parked_are_waited_for() -> None:
    copies = LateCopies()
    parking, memory = PinnedParking(KIB, copies), filled(KIB, 3)
    first, second, third = memory[:64], memory[64:128], memory[128:192]
    for slot in (first, second):
        parking.park(slot)
    parking.settle(third)
    assert len(copies.waiting) == 2
    parking.settle(memory[32:96])
    assert copies.waiting == []
    third_parked = parking.park(third)
    parking.unpark(third_parked, first)
    assert copies.waiting == [], "an unparked slot is used at once"


def test_what_is_parked_may_be_read_when_it_is_there() -> None:
    copies = LateCopies()
    parking = PinnedParking(KIB, copies)
    first, second = parking.park(filled(64, 7)), parking.park(filled(64, 8))
    assert torch.equal(parking.read(first), filled(64, 7))
    assert len(copies.waiting) == 1, "the other need not be there"
    assert torch.equal(parking.read(second), filled(64, 8))
    plain = PlainParking()
    assert torch.equal(plain.read(plain.park(filled(64, 9))), filled(64, 9))


def test_buffers_are_kept_for_the_next_of_their_size() -> None:
    copies = LateCopies()
    parking = PinnedParking(2 * 64, copies)
    for value in range(5):
        parked = parking.park(filled(64, value))
        parking.forget(parked)
    assert len(copies.pinned) == 1
    parking.forget(parking.park(filled(128, 1)))
    assert (len(copies.pinned), copies.unpinned) == (2, 1), "the smaller one had to go"


@pytest.mark.parametrize("hurry", [0.0, 0.5])
def test_sessions_answer_as_if_they_had_never_been_parked(
    monkeypatch: pytest.MonkeyPatch, make_engine: Callable[..., Engine], hurry: float
) -> None:
    """Sessions of two sizes of slots, more than fit, take their turns in any order."""
    policies = ["buzz(sink=2,window=8,threshold=20,stride=5)", "h2o(heavy=30,recent=20,block=4)"]
    copies: list[LateCopies] = []

    def late(device: torch.device, budget: int) -> Parking:
        copies.append(LateCopies(hurry))
        return PinnedParking(budget, copies[-1])

    roomy = make_engine(start=False)
    with monkeypatch.context() as patch:
        patch.setattr(worker, "parking_of", late)
        tight = make_engine(start=False, cache_budget=86_144 + 6 * 14_080)
    chance, most = random.Random(2), 0
    for number in range(10):
        for engine in (roomy, tight):
            create(engine, str(number), policies[number % 2])
    for turn in range(40):
        id, text = str(chance.randrange(10)), "x" * chance.randint(3, 40)
        answers = [ask(engine, text, id, max_tokens=12).token_ids for engine in (roomy, tight)]
        assert answers[0] == answers[1], turn
        most = max(most, tight.capacity().parked_sessions)
    assert most > 3
    assert copies[0].pinned
    for engine in (roomy, tight):
        for number in range(10):
            engine.keeper.delete("default", str(number))
        step(engine)
        assert engine.capacity().parked_bytes == 0


class FakeCuda:
    """Notes what happens, and on which stream."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.now = "main"

    def Stream(self, device: torch.device) -> Any:
        return FakeStream(self, "side")

    def current_stream(self, device: torch.device) -> Any:
        return FakeStream(self, self.now)

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        self.now = stream.name
        yield
        self.now = "main"


@dataclass
class FakeStream:
    cuda: FakeCuda
    name: str

    def wait_stream(self, other: FakeStream) -> None:
        self.cuda.log.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> FakeEvent:
        self.cuda.log.append(f"event on {self.name}")
        return FakeEvent(self.cuda)

    def wait_event(self, event: FakeEvent) -> None:
        self.cuda.log.append(f"{self.name} waits for the event")


@dataclass
class FakeEvent:
    cuda: FakeCuda

    def synchronize(self) -> None:
        self.cuda.log.append("the host waits for the event")


def test_what_is_asked_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    for name in ("Stream", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    copies = CudaCopies(torch.device("cuda"))

    class Target:
        def copy_(self, source: Tensor, non_blocking: bool) -> None:
            cuda.log.append(f"copy on {cuda.now}, {non_blocking=}")

    copy = copies.start(Target(), filled(8, 1))  # type: ignore[arg-type]
    copy.wait()
    copy.join()
    assert cuda.log == [
        "side waits for main",
        "copy on side, non_blocking=True",
        "event on side",
        "main waits for the event",
        "the host waits for the event",
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpus_slots_come_back_as_they_were() -> None:
    device = torch.device("cuda")
    parking = parking_of(device, 4 * 2**20)
    memory = torch.randint(256, (4, 2**20), dtype=torch.uint8, device=device)
    before = memory.cpu()
    parked = [parking.park(slot) for slot in memory]
    assert all(buffer.is_pinned() for buffer in parked)
    for slot in memory:
        parking.settle(slot)
        slot.zero_()
    for slot, buffer in zip(reversed(memory.unbind()), parked, strict=True):
        parking.settle(slot)
        parking.unpark(buffer, slot)
        parking.forget(buffer)
    assert torch.equal(memory.cpu(), before.flip(0))


def test_a_buffer_that_came_back_is_used_again() -> None:
    parking, slots = PlainParking(), [torch.randint(256, (KIB,), dtype=torch.uint8) for _ in range(3)]
    first = parking.park(slots[0])
    home = first.data_ptr()
    parking.forget(first)
    second, third = parking.park(slots[1]), parking.park(slots[2])
    assert second.data_ptr() == home != third.data_ptr()
    assert torch.equal(second, slots[1])
    assert torch.equal(third, slots[2])
    parking.forget(second)
    assert parking.park(torch.zeros(2 * KIB, dtype=torch.uint8)).numel() == 2 * KIB
