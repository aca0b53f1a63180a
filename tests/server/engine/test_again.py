"""The same request again: a committed turn answers without computing, one in flight goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import pytest

from apiary_server import errors
from apiary_server.engine.engine import Engine
from apiary_server.engine.request import Sampling, TurnRequest
from apiary_server.engine.result import Delta, FinishReason
from tests.server.driver import Reader, ask, begin, create, request, run, session, state, step

MakeEngine = Callable[..., Engine]
PROMPT = list(range(3, 153))


@pytest.fixture
def engine(make_engine: MakeEngine) -> Engine:
    engine = make_engine(start=False)
    create(engine, "a")
    return engine


def test_a_committed_turn_is_answered_without_computing(engine: Engine) -> None:
    sampling = Sampling(temperature=1.0)
    first = ask(engine, PROMPT, "a", max_tokens=20, sampling=sampling, request_id="x")
    ask(engine, "something else", "a")
    before = state(session(engine, "a"))
    again = begin(engine, request(PROMPT, "a", max_tokens=20, sampling=sampling, request_id="x"))
    assert again.ended, "nothing needs to be computed"
    assert (again.token_ids, again.text) == (first.token_ids, first.text)
    assert again.deltas[-1].finish_reason is FinishReason.LENGTH
    assert again.usage.seed == first.usage.seed
    assert again.usage.completion_tokens == 20
    assert state(session(engine, "a"))["transcript"] == before["transcript"]


@pytest.mark.parametrize("index", [0, 1, 7, 19, 20])
def test_the_rest_of_a_committed_answer(engine: Engine, index: int) -> None:
    first = ask(engine, PROMPT, "a", max_tokens=20, request_id="x")
    text = "".join(delta.text for delta in first.deltas if delta.index >= index)
    again = begin(engine, request(PROMPT, "a", max_tokens=20, request_id="x", next_index=index))
    assert again.token_ids == first.token_ids[index:]
    assert again.text == text
    assert again.deltas[0].index == index


@pytest.mark.parametrize("committed", [True, False])
def test_a_place_that_no_answer_has(engine: Engine, committed: bool) -> None:
    first = begin(engine, request(PROMPT, "a", max_tokens=20, request_id="x"))
    while len(first.token_ids) < 5:
        step(engine)
    if committed:
        run(engine, first)
    turn = request(PROMPT, "a", max_tokens=20, request_id="x", next_index=21)
    if committed:
        with pytest.raises(errors.InvalidField, match="20 tokens so far"):
            engine.open(turn, Reader())
    else:
        queued = engine.open(turn, Reader())
        step(engine)
        with pytest.raises(errors.InvalidField, match="next_index"):
            queued.result(10)
        run(engine, first)
        assert len(first.token_ids) == 20, "the call before is not disturbed"
    assert not engine._admission


def test_a_fault_while_it_is_sought_is_the_second_call_s_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = begin(engine, request(PROMPT, "a", max_tokens=20, request_id="x"))
    step(engine, 2)

    def fail(request: TurnRequest, tokens: Sequence[int]) -> Delta:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(engine._admission._door, "again", fail)
    queued = engine.open(request(PROMPT, "a", max_tokens=20, request_id="x"), Reader())
    step(engine)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        queued.result(10)
    assert not engine._admission, "its place is given back"
    run(engine, first)
    assert len(first.token_ids) == 20


def test_an_answer_that_ended_within_a_token_is_told_again_to_the_letter(engine: Engine) -> None:
    whole = ask(engine, PROMPT, max_tokens=60).text
    stop = (whole[11:13],)
    first = ask(engine, PROMPT, "a", max_tokens=60, stop=stop, request_id="x")
    again = ask(engine, PROMPT, "a", max_tokens=60, stop=stop, request_id="x")
    assert (again.text, again.token_ids) == (first.text, first.token_ids)
    assert again.deltas[-1].finish_reason is FinishReason.STOP


@pytest.mark.parametrize(
    "other", [{"max_tokens": 21}, {"sampling": Sampling(temperature=0.5)}, {"logprobs": 1}, {"stop": ("x",)}]
)
@pytest.mark.parametrize("committed", [True, False])
def test_an_id_names_one_request(engine: Engine, committed: bool, other: dict[str, object]) -> None:
    reader = begin(engine, request(PROMPT, "a", max_tokens=20, request_id="x"))
    if committed:
        run(engine, reader)
    else:
        step(engine, 3)
    with pytest.raises(errors.InvalidField) as caught:
        engine.open(request(PROMPT, "a", **{"max_tokens": 20, "request_id": "x", **other}), Reader())  # type: ignore[arg-type]
    assert [field for field, _ in caught.value.violations] == ["request_id"]
    assert not engine._admission, "a refused request gives its place back"


def test_ids_belong_to_sessions(engine: Engine) -> None:
    ask(engine, PROMPT, "a", max_tokens=20, request_id="x")
    create(engine, "b")
    assert len(ask(engine, "another", "b", max_tokens=5, request_id="x").token_ids) == 5
    with pytest.raises(errors.SessionNotFound):
        engine.open(request(PROMPT, "a", max_tokens=20, request_id="x", tenant="other"), Reader())


@pytest.mark.parametrize("gone", [True, False])
@pytest.mark.parametrize("taken", [0, 3])
def test_a_turn_in_flight_goes_on(engine: Engine, taken: int, gone: bool) -> None:
    calm = ask(engine, PROMPT, max_tokens=30)
    first = begin(engine, request(PROMPT, "a", max_tokens=30, request_id="x"))
    while len(first.token_ids) < 8:
        step(engine)
    if gone:
        first.close()
        step(engine, 5)
    second = begin(engine, request(PROMPT, "a", max_tokens=30, request_id="x", next_index=taken))
    run(engine, second)
    assert isinstance(first.error, errors.Cancelled)
    assert second.deltas[0].index == taken
    assert first.token_ids[:taken] + second.token_ids == calm.token_ids
    assert "".join(delta.text for delta in calm.deltas if delta.index >= taken) == second.text
    assert session(engine, "a").transcript.tolist() == [*PROMPT, *calm.token_ids]


def test_a_turn_that_nobody_reads_runs_to_its_end_within_the_grace(engine: Engine) -> None:
    first = begin(engine, request(PROMPT, "a", max_tokens=30, request_id="x"))
    step(engine, 2)
    first.close()
    step(engine, 40)
    assert session(engine, "a").turns[-1].completion_tokens == 30
    assert len(ask(engine, PROMPT, "a", max_tokens=30, request_id="x").token_ids) == 30


def test_after_the_grace_it_is_cancelled(make_engine: MakeEngine) -> None:
    engine = make_engine(start=False, reattach_grace=0.05)
    create(engine, "a")
    first = begin(engine, request(PROMPT, "a", max_tokens=1000, request_id="x"))
    step(engine, 2)
    first.close()
    step(engine)
    assert first.error is None
    time.sleep(0.06)
    step(engine)
    assert isinstance(first.error, errors.Cancelled)
    assert len(ask(engine, PROMPT, "a", max_tokens=5, request_id="x").token_ids) == 5


def test_another_turn_of_the_session_ends_it_at_once(engine: Engine) -> None:
    first = begin(engine, request(PROMPT, "a", max_tokens=1000, request_id="x"))
    step(engine, 2)
    first.close()
    step(engine)
    second = Reader()
    waiting = engine.open(request("another", "a", max_tokens=5), second)
    step(engine)
    assert isinstance(first.error, errors.Cancelled)
    waiting.result(10)
    run(engine, second)
    assert len(second.token_ids) == 5


def test_twice_in_line(engine: Engine) -> None:
    first = begin(engine, request("first", "a", max_tokens=5))
    readers = [Reader(), Reader()]
    waiting = [
        engine.open(request("second", "a", max_tokens=7, request_id="x", wait=True), reader)
        for reader in readers
    ]
    run(engine, first)
    waiting[0].result(10)
    run(engine, readers[0])
    waiting[1].result(10)
    assert readers[0].token_ids == readers[1].token_ids
    assert session(engine, "a").turns[-1].completion_tokens == 7
    assert len(session(engine, "a").turns) == 2
    assert not engine._admission


def test_what_a_second_call_read_is_kept_from_where_it_began(engine: Engine) -> None:
    first = begin(engine, request(PROMPT, "a", max_tokens=300, request_id="x", keep=True))
    while len(first.token_ids) < 6:
        step(engine)
    first.close()
    second = begin(
        engine, request(PROMPT, "a", max_tokens=300, request_id="x", keep=True, next_index=6), reads=False
    )
    while len(second.token_ids) < 9:
        step(engine)
    second.read(4)
    second.close()
    other = Reader()
    waiting = engine.open(request("go on", "a", max_tokens=3), other)  # ends it before the grace is over
    run(engine, second)
    waiting.result(10)
    run(engine, other)
    answer = [*first.token_ids[:6], *second.token_ids[:4]]
    assert session(engine, "a").transcript[: len(PROMPT) + 10].tolist() == [*PROMPT, *answer]
