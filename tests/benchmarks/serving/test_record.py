"""What is measured of one turn, by a clock that the tests set."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any, cast

import grpc
import pytest

from apiary_bench.serving import record
from apiary_bench.serving.plan import Turn
from apiary_bench.serving.record import Outcome, Record, measure
from apiary_client import Delta, FinishReason, aio
from apiary_client.errors import QueueFull, Unavailable
from tests.benchmarks.serving.fake_client import usage

Message = tuple[float, int] | tuple[float, Exception]


class Scripted:
    """A client whose answer is a list of (time, tokens); the last message is the final one."""

    def __init__(self, script: Sequence[Message], *, final: bool = True) -> None:
        self.now = 100.0
        self.closed = False
        self.asked: dict[str, Any] = {}
        self._script = script
        self._final = final

    async def stream(self, **asked: Any) -> AsyncGenerator[Delta]:
        self.asked = asked
        try:
            for place, (time, what) in enumerate(self._script):
                self.now = time
                if isinstance(what, Exception):
                    raise what
                last = self._final and place == len(self._script) - 1
                yield Delta(
                    "",
                    tuple(range(what)),
                    finish_reason=FinishReason.LENGTH if last else None,
                    usage=usage(3, 40, 4) if last else None,
                )
        finally:
            self.closed = True


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Measure a turn of three tokens that asks for four and is sent at 100, 20 s after the beginning."""

    async def one(client: Scripted, **changes: Any) -> Record:
        monkeypatch.setattr(record, "perf_counter", lambda: client.now)
        turn = Turn(5, 2, [7, 8, 9], output=4, **changes)
        return await measure(cast(aio.Client, client), "sessions/x", turn, 80.0, 9.0)

    return one


async def test_a_turn_that_is_completed(run: Any) -> None:
    client = Scripted([(101.0, 1), (101.5, 0), (102.0, 2), (104.0, 1)])
    found = await run(client, at=19.5)
    assert found == Record(
        session=5,
        turn=2,
        scheduled=19.5,
        sent=20.0,
        ended=4.0,
        arrivals=(1.0, 2.0, 4.0),
        arrival_tokens=(1, 2, 1),
        input=3,
        asked=4,
        outcome=Outcome.COMPLETED,
        usage=usage(3, 40, 4),
    )
    assert (found.tokens, found.ttft, found.tpot, found.e2el) == (4, 1.0, 1.0, 4.0)
    assert found.itl == [1.0, 2.0]  # two tokens that came together are one arrival
    assert found.delay == 0.5
    assert client.asked["token_ids"] == [7, 8, 9]
    assert client.asked["session"] == "sessions/x"
    assert client.asked["timeout"] == 9.0
    stopping = client.asked["stopping"]
    assert (stopping.max_tokens, stopping.ignore_eos) == (4, True)


async def test_the_last_message_may_bring_no_token(run: Any) -> None:
    found = await run(Scripted([(101.0, 4), (103.0, 0)]))
    assert found.outcome is Outcome.COMPLETED
    assert (found.arrivals, found.e2el, found.itl, found.delay) == ((1.0,), 3.0, [], None)
    assert found.tpot == 0  # all of its tokens came at once


async def test_one_token_has_no_time_per_output_token(run: Any) -> None:
    found = await run(Scripted([(101.0, 1)]))
    assert (found.ttft, found.tpot, found.outcome) == (1.0, None, Outcome.CUT_SHORT)


@pytest.mark.parametrize(("script", "final"), [([(101.0, 1), (102.0, 2)], True), ([(101.0, 4)], False)])
async def test_fewer_tokens_or_no_end_is_cut_short(script: list[Message], final: bool, run: Any) -> None:
    found = await run(Scripted(script, final=final))
    assert (found.outcome, found.reason) == (Outcome.CUT_SHORT, None)


async def test_a_failure_keeps_what_came(run: Any) -> None:
    error = QueueFull("no room", code=grpc.StatusCode.RESOURCE_EXHAUSTED, reason="QUEUE_FULL")
    found = await run(Scripted([(101.0, 1), (103.0, error)]))
    assert (found.outcome, found.reason, found.message) == (Outcome.FAILED, "QUEUE_FULL", "no room")
    assert (found.arrivals, found.ended, found.usage) == ((1.0,), 3.0, None)
    early = await run(Scripted([(101.0, Unavailable("gone", code=grpc.StatusCode.UNAVAILABLE))]))
    assert (early.reason, early.ttft, early.tokens, early.ended) == ("UNAVAILABLE", None, 0, 1.0)


@pytest.mark.parametrize(("after", "arrivals"), [(1, (1.0,)), (2, (1.0, 2.0)), (3, (1.0, 2.0))])
async def test_a_cancel_comes_when_its_tokens_have(after: int, arrivals: tuple[float, ...], run: Any) -> None:
    client = Scripted([(101.0, 1), (102.0, 2), (103.0, 1)])
    found = await run(client, cancel_after=after)
    assert (found.outcome, found.arrivals, found.cancel_after) == (Outcome.CANCELLED, arrivals, after)
    assert found.ended == arrivals[-1]
    assert client.closed


async def test_a_turn_that_ends_before_its_cancel_is_completed(run: Any) -> None:
    found = await run(Scripted([(101.0, 1), (102.0, 3)]), cancel_after=2)
    assert (found.outcome, found.cancel_after) == (Outcome.COMPLETED, 2)
