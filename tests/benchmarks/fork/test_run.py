"""Forks in a worker that is none: what is asked, in which order, and what makes a run void."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import grpc
import pytest

from apiary_bench.errors import LoadError, SettingsError, VoidError
from apiary_bench.fork import run as module
from apiary_bench.fork.run import Fork, Forks, Plan
from apiary_bench.own import worker
from apiary_bench.own.turn import First
from apiary_client import Capacity, Delta, FinishReason, Model, RebuildReason, State, Stopping, Usage, aio
from apiary_client.errors import ApiaryError, BudgetExhausted, QueueFull
from tests.benchmarks.serving.fake_client import MODEL, capacity

PLAN = Plan(history=90, forks=7, holds=3, input=9, output=4, concurrency=2)
SLOT = 2**20
WORKSPACE = 1000


@dataclass
class FakeWorkers:
    """Workers one after the other, and all their clients. Sessions that do not fit are parked.

    Attributes:
        log: what was done, in order; a turn as its session and the tokens of its input.
        spoilt: what comes in place of a session's answer: an error, other tokens, or a usage.
        narrow: so many slots less than the budget has.
        full: after so many sessions there is no room for another.
    """

    log: list[Any] = field(default_factory=list)
    spoilt: dict[str, ApiaryError | tuple[int, ...] | Usage] = field(default_factory=dict)
    narrow: int = 0
    full: int = 1000
    budget: int = 2**30
    sessions: list[str] = field(default_factory=list)
    running: int = 0
    most_running: int = 0

    @asynccontextmanager
    async def serving(self, name: str, flags: Mapping[str, str], log: Path) -> AsyncIterator[tuple[Any, str]]:
        assert log.parent == Path(flags["--state-dir"]).parent
        self.budget = int(flags.get("--cache-budget", 2**30))
        self.log.append(("start", flags.get("--policy"), flags.get("--cache-budget")))
        try:
            yield SimpleNamespace(kill=lambda: self.log.append("kill")), "there:1"
        finally:
            self.log.append("end")

    @property
    def most(self) -> int:
        return (self.budget - WORKSPACE) // SLOT - 1 - self.narrow

    @property
    def resident(self) -> int:
        return min(len(self.sessions), self.most)

    def capacity(self) -> Capacity:
        parked = len(self.sessions) - self.resident
        return dataclasses.replace(
            capacity(),
            budget_bytes=self.budget,
            workspace_bytes=WORKSPACE,
            slot_bytes=SLOT,
            max_resident_sessions=self.most,
            resident_sessions=self.resident,
            parked_sessions=parked,
            parked_bytes=parked * SLOT,
        )


@dataclass
class FakeClient:
    """The methods that a run needs."""

    worker: FakeWorkers

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def get_model(self, **_: float) -> Model:
        return MODEL

    async def get_capacity(self, **_: float) -> Capacity:
        return self.worker.capacity()

    async def create_session(self, session: str, **_: Any) -> None:
        self.worker.sessions.append(session)

    async def fork_session(self, session: str, other: str, **_: float) -> None:
        if len(self.worker.sessions) == self.worker.full:
            code = grpc.StatusCode.RESOURCE_EXHAUSTED
            raise BudgetExhausted("no room", code=code, reason="BUDGET_EXHAUSTED")
        self.worker.sessions.append(other)
        self.worker.log.append((session, other))

    async def list_sessions(self, **_: float) -> AsyncIterator[Any]:
        for place in range(len(self.worker.sessions)):
            yield SimpleNamespace(state=State.RESIDENT if place < self.worker.resident else State.PARKED)

    async def stream(
        self, *, token_ids: list[int], session: str, stopping: Stopping
    ) -> AsyncGenerator[Delta]:
        worker, most = self.worker, stopping.max_tokens
        assert most is not None
        assert stopping.ignore_eos
        worker.running += 1
        worker.most_running = max(worker.most_running, worker.running)
        await asyncio.sleep(0)
        worker.running -= 1
        first = ("turn", session, 90) not in worker.log and session == "fork"
        worker.log.append(("turn", session, len(token_ids)))
        spoilt = None if first else worker.spoilt.get(session)
        if isinstance(spoilt, ApiaryError):
            raise spoilt
        tokens = spoilt if isinstance(spoilt, tuple) else tuple(token_ids[:most])
        usage = spoilt if isinstance(spoilt, Usage) else found(0 if first else 90)
        yield Delta("a", tokens[:1])
        yield Delta("b", tokens[1:])
        yield Delta("", (), len(tokens), finish_reason=FinishReason.LENGTH, usage=usage)


def found(cached: int, reason: RebuildReason | None = None) -> Usage:
    """A usage that says that so much was in the cache."""
    return Usage(9, cached, 4, 0, 0.0, 0.0, 0.0, 0, reason)


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> FakeWorkers:
    fakes = FakeWorkers()
    monkeypatch.setattr(worker, "serving", fakes.serving)
    monkeypatch.setattr(aio, "Client", lambda target: FakeClient(fakes))
    return fakes


def left(directory: Path) -> list[Path]:
    return list(directory.iterdir())


async def measure(plan: Plan, tmp_path: Path, **flags: str) -> tuple[Forks, list[tuple[str, int, int]]]:
    """Run it; nothing is left in the directory. Returns also what the observer heard."""
    heard: list[tuple[str, int, int]] = []
    try:
        options = {f"--{name}": value for name, value in flags.items()}
        return await module.run(plan, options, lambda *a: heard.append(a), tmp_path), heard
    finally:
        assert left(tmp_path) == []


async def test_what_is_asked(workers: FakeWorkers, tmp_path: Path) -> None:
    found, heard = await measure(PLAN, tmp_path, policy="buzz")
    names = [f"fork-{number}" for number in range(7)]
    budget = WORKSPACE + (3 + 1) * SLOT
    assert workers.log[:-10] == [
        ("start", "buzz", None),
        "end",
        ("start", "buzz", str(budget)),
        ("turn", "fork", 90),
        *(("fork", name) for name in names),
    ]
    assert sorted(workers.log[-10:-2]) == sorted(("turn", name, 9) for name in ("fork", *names))
    assert workers.log[-2:] == ["kill", "end"]
    assert workers.most_running == 2
    assert (found.model, found.capacity.budget_bytes) == (MODEL, budget)
    assert heard == [*(("forks", done, 7) for done in range(8)), *(("answers", done, 8) for done in range(9))]


async def test_what_is_found(workers: FakeWorkers, tmp_path: Path) -> None:
    found, _ = await measure(PLAN, tmp_path)
    assert [fork.displaced for fork in found.forks] == [0, 0, 1, 1, 1, 1, 1]
    assert [fork.copied_bytes for fork in found.forks] == 2 * [SLOT] + 5 * [2 * SLOT]
    assert all(0 < fork.seconds < 10 for fork in found.forks)
    assert found.made == found.answered == {"resident": 3, "parked": 5}
    assert [(first.cached_tokens, first.rebuild_reason) for first in found.firsts] == 8 * [(90, None)]
    assert all(0 < first.seconds < 10 for first in found.firsts)


@pytest.mark.parametrize(
    ("spoilt", "why"),
    [
        (
            QueueFull("no place", code=grpc.StatusCode.RESOURCE_EXHAUSTED, reason="QUEUE_FULL"),
            "^1 of 8 sessions did not answer: QUEUE_FULL: no place",
        ),
        ((5, 5, 5, 5), "^1 of 8 sessions answered otherwise than the first"),
        (found(89), "^a turn of a fork found 89 tokens"),
        (found(90, RebuildReason.RESTARTED), r"\(rebuild_reason: restarted\)"),
    ],
)
async def test_an_answer_that_is_not_the_others_makes_it_void(
    workers: FakeWorkers, tmp_path: Path, spoilt: Any, why: str
) -> None:
    workers.spoilt["fork-3"] = spoilt
    with pytest.raises(VoidError, match=why):
        await measure(PLAN, tmp_path)
    assert workers.log[-1] == "end"


async def test_answers_that_end_too_early(workers: FakeWorkers, tmp_path: Path) -> None:
    workers.spoilt["fork-3"] = (5, 5)
    with pytest.raises(LoadError, match="an answer ended after 2 of 4 tokens"):
        await measure(PLAN, tmp_path)


async def test_a_fork_that_is_refused_is_told(workers: FakeWorkers, tmp_path: Path) -> None:
    workers.full = 5
    with pytest.raises(LoadError, match="BUDGET_EXHAUSTED: no room"):
        await measure(PLAN, tmp_path)


async def test_a_budget_that_does_not_hold_what_it_should(workers: FakeWorkers, tmp_path: Path) -> None:
    workers.narrow = 1
    with pytest.raises(VoidError, match="the cache budget holds 2 sessions, not 3"):
        await measure(PLAN, tmp_path)


async def test_inputs_that_the_worker_never_takes(workers: FakeWorkers, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="takes turns of at most 100 tokens"):
        await measure(Plan(history=101), tmp_path)
    assert workers.log == [("start", None, None), "end"]


@pytest.mark.parametrize("name", ["history", "forks", "holds", "input", "output", "concurrency"])
def test_a_plan_out_of_range(name: str) -> None:
    least = 2 if name == "holds" else 1
    values: dict[str, Any] = {name: least - 1}
    with pytest.raises(SettingsError, match=f"{name} must be at least {least}, not {least - 1}"):
        Plan(**values)
    Plan(**{name: least})


def fork(seconds: float, displaced: int = 0) -> Fork:
    return Fork(seconds=seconds, displaced=displaced, copied_bytes=(1 + displaced) * SLOT)


FOUND = Forks(
    model=MODEL,
    capacity=capacity(),
    forks=[fork(0.007), fork(0.009), fork(0.1), fork(0.02, 1), fork(0.04, 1)],
    made={"resident": 4, "parked": 2},
    answered={"resident": 3, "parked": 2, "stored": 1},
    firsts=[
        First(seconds=seconds, cached_tokens=3000, rebuild_reason=None)
        for seconds in (0.1, 0.2, 0.3, 0.5, 0.8, 1.3)
    ],
)


def test_medians_and_sums() -> None:
    assert (FOUND.fork, FOUND.beyond, FOUND.first) == pytest.approx((0.009, 0.03, 0.4))
    assert FOUND.copied_bytes == 7 * SLOT
    few = dataclasses.replace(FOUND, forks=FOUND.forks[:2])
    assert few.fork == pytest.approx(0.008)
    assert few.beyond is None
