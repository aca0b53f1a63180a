"""Restarts of a worker that is none: what is asked, in which order, and what makes a run void."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import grpc
import pytest

from apiary_bench.errors import LoadError, SettingsError, VoidError
from apiary_bench.own import worker
from apiary_bench.own.turn import First
from apiary_bench.resume import run as module
from apiary_bench.resume.run import Plan, Repeat, Resume
from apiary_client import Capacity, Delta, FinishReason, Model, RebuildReason, Stopping, Usage, aio
from apiary_client.errors import QueueFull
from tests.benchmarks.serving.fake_client import MODEL, capacity

PLAN = Plan(history=90, input=7, turns=3, repeats=2)


@dataclass
class FakeWorkers:
    """Workers on one directory, one after the other, and all their clients.

    Attributes:
        log: what was done, in order; a turn as its session and the tokens of its input.
        forgetful: they never find a snapshot; or never miss one.
        slow: they make no snapshots.
        refusal: raised in place of answers.
    """

    log: list[Any] = field(default_factory=list)
    forgetful: bool | None = None
    slow: bool = False
    refusal: Exception | None = None
    tokens: dict[str, int] = field(default_factory=dict)
    turns: dict[str, int] = field(default_factory=dict)
    warm: set[str] = field(default_factory=set)
    state: Path = Path()

    @asynccontextmanager
    async def serving(self, name: str, flags: Mapping[str, str], log: Path) -> AsyncIterator[tuple[Any, str]]:
        assert log.parent.is_dir()
        self.state = Path(flags["--state-dir"])
        (self.state / "snapshots").mkdir(parents=True, exist_ok=True)
        self.log.append(("start", flags.get("--policy")))
        self.warm.clear()
        try:
            yield SimpleNamespace(kill=lambda: self.log.append("kill")), "there:1"
        finally:
            self.log.append("end")

    def store(self, session: str) -> None:
        if not self.slow:
            snapshots = self.state / "snapshots"
            for old in snapshots.glob(f"{session}:*"):
                old.unlink()
            (snapshots / f"{session}:-{self.turns[session]}.snapshot").write_bytes(bytes(1000))

    def take(self, session: str, count: int) -> Usage:
        """A turn, and what it says of itself."""
        if self.refusal is not None:
            raise self.refusal
        seen = self.tokens[session]
        stored = any((self.state / "snapshots").glob(f"{session}:*"))
        found = session in self.warm or (stored if self.forgetful is None else not self.forgetful)
        self.tokens[session], self.turns[session] = seen + count + 1, self.turns[session] + 1
        self.warm.add(session)
        self.store(session)
        self.log.append((session, count))
        reason = None if found or not seen else RebuildReason.RESTARTED
        return Usage(count, seen if found else 0, 1, 0, 0.0, 0.0, 0.0, 0, reason)


@dataclass
class FakeClient:
    """The methods that a run needs."""

    workers: FakeWorkers

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def get_model(self, **_: float) -> Model:
        return MODEL

    async def get_capacity(self, **_: float) -> Capacity:
        return capacity()

    async def create_session(self, session: str, **_: Any) -> None:
        self.workers.tokens[session] = self.workers.turns[session] = 0

    async def fork_session(self, session: str, other: str, **_: float) -> None:
        for table in (self.workers.tokens, self.workers.turns):
            table[other] = table[session]
        self.workers.log.append(("fork", other))
        self.workers.store(other)

    async def delete_session(self, session: str, **_: float) -> None:
        del self.workers.tokens[session], self.workers.turns[session]

    async def stream(
        self, *, token_ids: list[int], session: str, stopping: Stopping
    ) -> AsyncGenerator[Delta]:
        assert (stopping.max_tokens, stopping.ignore_eos) == (1, True)
        await asyncio.sleep(0)
        usage = self.workers.take(session, len(token_ids))
        yield Delta("a", (5,))
        yield Delta("", (), 1, finish_reason=FinishReason.LENGTH, usage=usage)


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> FakeWorkers:
    fakes = FakeWorkers()
    monkeypatch.setattr(worker, "serving", fakes.serving)
    monkeypatch.setattr(aio, "Client", lambda target: FakeClient(fakes))
    return fakes


def left(directory: Path) -> list[Path]:
    return list(directory.iterdir())


async def measure(plan: Plan, tmp_path: Path, **flags: str) -> Resume:
    """Run it; nothing is left in the directory."""
    heard: list[tuple[str, int, int]] = []
    try:
        return await module.run(
            plan, {f"--{name}": value for name, value in flags.items()}, lambda *a: heard.append(a), tmp_path
        )
    finally:
        assert left(tmp_path) == []
        assert all(stage == "turns" and total == plan.repeats * (plan.turns + 3) for stage, _, total in heard)


async def test_what_is_asked(workers: FakeWorkers, tmp_path: Path) -> None:
    found = await measure(PLAN, tmp_path, policy="buzz")
    start = ("start", "buzz")
    expected: list[Any] = []
    for name in ("resume-0", "resume-1"):
        expected += [start, (name, 90), "end", start, (name, 7), "end", start, *4 * [(name, 7)], "end"]
    assert workers.log == expected
    assert workers.tokens == {}, "all are deleted"
    assert (found.model, found.snapshot_bytes) == (MODEL, 1000)
    for repeat in found.repeats:
        assert (repeat.resumed.cached_tokens, repeat.resumed.rebuild_reason) == (91, None)
        assert (repeat.recomputed.cached_tokens, repeat.recomputed.rebuild_reason) == (0, "restarted")
        assert [first.cached_tokens for first in repeat.warm] == [107, 115, 123]
        assert len(repeat.ready) == 3
        assert all(first.seconds > 0 for first in (repeat.resumed, repeat.recomputed, *repeat.warm))


async def test_workers_are_killed(workers: FakeWorkers, tmp_path: Path) -> None:
    await measure(Plan(history=90, turns=1, repeats=1, kill=True), tmp_path)
    ends = [before for before, entry in zip(workers.log, workers.log[1:], strict=False) if entry == "end"]
    assert ends == 3 * ["kill"]


async def test_others_come_between(workers: FakeWorkers, tmp_path: Path) -> None:
    found = await measure(Plan(history=90, turns=1, others=2, repeats=1), tmp_path)
    assert workers.log[1:5] == [("resume-0", 90), ("fork", "resume-0-0"), ("fork", "resume-0-1"), "end"]
    assert workers.tokens == {}
    assert found.repeats[0].recomputed.cached_tokens == 0


@pytest.mark.parametrize(
    ("forgetful", "why"),
    [
        (True, r"after the start found 0 tokens .* at least 90 should .* \(rebuild_reason: restarted\)"),
        (False, "whose snapshot was deleted"),
    ],
)
async def test_what_was_not_to_be_is_void(
    workers: FakeWorkers, tmp_path: Path, forgetful: bool, why: str
) -> None:
    workers.forgetful = forgetful
    with pytest.raises(VoidError, match=why):
        await measure(PLAN, tmp_path)


async def test_a_snapshot_that_does_not_come(
    workers: FakeWorkers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_STORED", 0.05)
    workers.slow = True
    with pytest.raises(LoadError, match="a turn had no snapshot after 0 s"):
        await measure(PLAN, tmp_path)


async def test_a_refusal_is_told(workers: FakeWorkers, tmp_path: Path) -> None:
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    workers.refusal = QueueFull("no room", code=code, reason="QUEUE_FULL")
    with pytest.raises(LoadError, match="QUEUE_FULL: no room"):
        await measure(PLAN, tmp_path)


async def test_inputs_that_the_worker_never_takes(workers: FakeWorkers, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="takes turns of at most 100 tokens"):
        await measure(Plan(history=101), tmp_path)
    assert workers.log == [("start", None), "end"]


@pytest.mark.parametrize("name", ["history", "input", "turns", "repeats", "others"])
def test_a_plan_out_of_range(name: str) -> None:
    values: dict[str, Any] = {name: -1}
    with pytest.raises(SettingsError, match=rf"{name} must be at least [01], not -1"):
        Plan(**values)


def first(seconds: float, cached: int = 3000, reason: str | None = None) -> First:
    return First(seconds=seconds, cached_tokens=cached, rebuild_reason=reason)


FOUND = Resume(
    model=MODEL,
    capacity=capacity(),
    snapshot_bytes=3 * 2**20,
    repeats=[
        Repeat(
            ready=[5.0, 6.0, 7.0],
            resumed=first(resumed),
            recomputed=first(5.0, 0, "restarted"),
            warm=[first(0.1, 3010), first(0.2, 3020), first(0.3, 3030)],
        )
        for resumed in (0.3, 0.25, 9.0)
    ],
)


def test_ratios_are_of_medians() -> None:
    assert (FOUND.warm, FOUND.resumed, FOUND.recomputed, FOUND.ready) == (0.2, 0.3, 5.0, 6.0)
    assert FOUND.slowdown == pytest.approx(1.5)
    assert FOUND.gain == pytest.approx(5 / 0.3)
