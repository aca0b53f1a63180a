"""A long prompt beside streams, of a worker that is a fake."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from typing import Any

import grpc
import pytest
from rich.console import Console

from apiary_bench.errors import LoadError, SettingsError
from apiary_bench.serving import interference, report
from apiary_bench.serving.interference import Interference, Scene, Time
from apiary_bench.serving.statistics import Distribution
from apiary_client.errors import QueueFull
from tests.benchmarks.serving.fake_client import MODEL, FakeWorker, capacity

FULL = QueueFull("full", code=grpc.StatusCode.RESOURCE_EXHAUSTED, reason="QUEUE_FULL")


def flat(seconds: float) -> Distribution:
    """Gaps of one length."""
    return Distribution.of([seconds] * 3)  # type: ignore[return-value]


def time(slowdown: float, wait: float) -> Time:
    return Time(alone=2.0, beside=2.0 * wait, quiet=flat(0.05), loaded=flat(0.05 * slowdown))


FOUND = Interference(model=MODEL, capacity=capacity(), times=[time(3.0, 2.0), time(1.5, 5.0), time(2.0, 3.0)])


def endless(_session: str | None, _turn: int, most: int) -> Sequence[int]:
    """Streams that do not end before they are cancelled; an answer of one token does."""
    return [1] * (1 if most == 1 else 10**6)


async def run(worker: FakeWorker, **values: Any) -> Interference:
    heard: list[tuple[str, int, int]] = []

    def observe(stage: str, done: int, total: int) -> None:
        heard.append((stage, done, total))

    scene = Scene(**({"streams": 3, "history": 40, "prompt": 90, "quiet": 5, "repeats": 2} | values))
    found = await interference.run(scene, worker.connect(None), observe)
    assert heard == [("history", done, scene.streams) for done in range(scene.streams + 1)] + [
        ("times", done, scene.repeats + 1) for done in range(scene.repeats + 2)
    ]
    return found


async def test_what_is_asked() -> None:
    worker = FakeWorker(answer=endless)
    found = await run(worker, policy="buzz")
    assert len(found.times) == 2
    assert (found.model, worker.policies) == (MODEL, {"buzz"})
    sessions = [name for _, name in worker.created]
    assert len(sessions) == 3
    for name in sessions:  # history, then a stream each time: as long as may be, since it is cancelled
        asked = [(len(one.token_ids), one.max_tokens) for one in worker.turns_of(name)]
        assert asked == [(40, 1)] + 3 * [(1, MODEL.max_tokens)]
    prompts = [one for one in worker.asked if one.session is None]
    assert [(len(one.token_ids), one.max_tokens) for one in prompts] == 6 * [(90, 1)]
    # alone and beside the same prompt, another each time
    assert [one.token_ids for one in prompts[::2]] == [one.token_ids for one in prompts[1::2]]
    assert len({one.token_ids for one in prompts}) == 3
    assert worker.sessions == {}, "all are deleted"


async def test_gaps_are_counted_where_they_belong() -> None:
    found = await run(FakeWorker(answer=endless), quiet=20)
    for one in found.times:
        assert one.quiet.count >= 3 * 19
        assert one.loaded.count >= 3, "at the least the gap in which the first token came"
        assert one.alone > 0
        assert one.beside > 0


def test_a_gap_belongs_to_every_time_that_it_touches() -> None:
    stream = interference._Stream("sessions/a", [1.0, 2.0, 4.0, 8.0])
    assert stream.gaps(0.0, 2.0) == [1.0]
    assert stream.gaps(2.0, 3.0) == [2.0]
    assert stream.gaps(3.0, 5.0) == [2.0, 4.0]
    assert stream.gaps(8.0, 9.0) == []


async def test_a_stream_that_ends_is_an_error() -> None:
    worker = FakeWorker()  # answers as many tokens as may be, and at once
    with pytest.raises(LoadError, match="a stream ended after 1000 tokens"):
        await run(worker, quiet=5000)
    assert worker.sessions == {}


async def test_a_refusal_is_raised_as_it_is() -> None:
    worker = FakeWorker(answer=lambda _session, turn, most: [FULL] if turn else [1])
    with pytest.raises(QueueFull):
        await run(worker)
    assert worker.sessions == {}


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"streams": 0}, "streams must be at least 1, not 0"),
        ({"prompt": 0}, "prompt must be at least 1, not 0"),
        ({"repeats": 0}, "repeats must be at least 1, not 0"),
        ({"quiet": 1}, "quiet must be at least 2"),
        (
            {"streams": 512},
            "513 turns beside each other need a cache budget .* start it with --cache-budget 1026MiB",
        ),
        ({"prompt": 101}, "the worker takes turns of at most 100 tokens"),
        ({"history": 101}, "the worker takes turns of at most 100 tokens"),
    ],
)
async def test_what_cannot_be(values: dict[str, int], why: str) -> None:
    worker = FakeWorker()
    with pytest.raises(SettingsError, match=why):
        await run(worker, **values)
    assert worker.created == []


def test_the_medians_are_of_the_ratios() -> None:
    assert FOUND.slowdown == pytest.approx(2.0)
    assert FOUND.wait == pytest.approx(3.0)


def test_the_report() -> None:
    out = StringIO()
    Console(file=out, width=200).print(report.interference(FOUND))
    lines = [line.replace("│", " ").split() for line in out.getvalue().splitlines()]
    assert ["1", "50.0", "150.0", "3.00x", "2000.0", "4000.0", "2.00x"] in lines
    assert ["median", "2.00x", "3.00x"] in lines
    heading = report.interference_heading(Scene(), FOUND)
    assert heading.startswith("a prompt of 4000 tokens beside 15 streams with 600 of history\nfake, buzz; ")
    content = report.interference_document(Scene(), FOUND)
    assert content["summary"] == {"slowdown": FOUND.slowdown, "wait": FOUND.wait}
    assert content["times"][1]["wait"] == pytest.approx(5.0)
    assert content["arguments"]["streams"] == 15
