"""The loop: turns commit whole or not at all, failures stay with their turns, memory comes back."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from apiary_server import errors
from apiary_server.engine.costs import Work
from apiary_server.engine.engine import Engine
from apiary_server.engine.request import Sampling
from apiary_server.engine.result import FinishReason, Observer, StepStats, TurnStats
from tests.server.driver import Reader, ask, begin, create, request, run, same, session, state, step

MakeEngine = Callable[..., Engine]
LONG = list(range(3, 203))  # 200 tokens: more than a slot of the default policy, less than a workspace


@pytest.fixture
def engine(make_engine: MakeEngine) -> Engine:
    return make_engine(start=False)


def leased(engine: Engine) -> int:
    capacity = engine.capacity()
    return capacity.used_bytes - capacity.workspaces * capacity.workspace_bytes


@pytest.mark.parametrize(
    "policy",
    [
        "buzz(sink=2,window=8,threshold=20)",
        "full(bound=600)",
        "streaming(sink=2,window=20,block=4)",
        "h2o(heavy=10,recent=10,block=4)",
    ],
)
def test_a_session_goes_on_and_stays_within_its_bound(engine: Engine, policy: str) -> None:
    create(engine, "a", policy)
    for turn in range(6):
        reader = ask(engine, "hello there", "a", max_tokens=30)
        info = engine.sessions.get("default", "a")
        assert len(reader.token_ids) == 30
        assert info.turn_count == turn + 1
        assert info.token_count == (turn + 1) * (11 + 30)
        assert 0 < info.entries <= info.bound
        assert reader.usage.cached_tokens == max(0, turn * 41 - 1)  # the last token of a turn is not computed
    engine.keeper.delete("default", "a")
    step(engine)
    assert leased(engine) == 0


def test_one_shot_requests_leave_nothing_behind(engine: Engine) -> None:
    reader = ask(engine, LONG, max_tokens=40)
    assert reader.deltas[-1].finish_reason is FinishReason.LENGTH
    assert reader.usage.evicted_entries > 0
    assert leased(engine) == 0
    assert engine.capacity().sessions == 0


def test_the_peak_does_not_depend_on_the_prompt(engine: Engine) -> None:
    ask(engine, LONG, max_tokens=4)
    peak = engine.capacity().peak_bytes
    ask(engine, LONG * 30, max_tokens=4)  # 6,000 tokens; the model has 1,024 positions
    assert engine.capacity().peak_bytes == peak


@pytest.mark.parametrize("positions", ["in_cache", "original"])
@pytest.mark.parametrize("after", [0, 1, 3, 9, 40])
@pytest.mark.parametrize("prompt", [[5], LONG[:10], LONG, LONG * 4])
def test_a_cancelled_turn_leaves_the_session_exactly_as_it_was(
    engine: Engine, positions: str, after: int, prompt: list[int]
) -> None:
    create(engine, "a", f"buzz(sink=2,window=8,threshold=20,positions={positions})")
    ask(engine, LONG * 4, "a", max_tokens=25)  # 825 of 1,024 positions: the next turns change over
    before, bytes_before = state(session(engine, "a")), leased(engine)
    reader = begin(engine, request(prompt, "a", max_tokens=300))
    step(engine, after)
    reader.close()
    step(engine)
    assert isinstance(reader.error, errors.Cancelled)
    assert same(before, state(session(engine, "a")))
    assert leased(engine) == bytes_before
    again = ask(engine, "go on", "a")
    assert len(again.token_ids) == 16


def test_a_cancelled_first_turn_leaves_an_empty_session(engine: Engine) -> None:
    create(engine, "a")
    before = state(session(engine, "a"))
    reader = begin(engine, request(LONG, "a"))
    step(engine, 2)
    reader.close()
    step(engine)
    assert same(before, state(session(engine, "a")))
    assert leased(engine) == 0


def test_a_turn_after_a_cancelled_one_answers_as_if_it_had_not_been(make_engine: MakeEngine) -> None:
    answers = []
    for cancelled in (False, True):
        engine = make_engine(start=False)
        create(engine, "a")
        ask(engine, LONG, "a", max_tokens=25)
        if cancelled:
            reader = begin(engine, request(LONG, "a", max_tokens=100))
            step(engine, 30)
            reader.close()
            step(engine)
        answers.append(ask(engine, "what now", "a", max_tokens=40).token_ids)
    assert answers[0] == answers[1]


def test_one_turn_at_a_time(engine: Engine) -> None:
    create(engine, "a")
    first = begin(engine, request("one", "a"))
    with pytest.raises(errors.SessionBusy):
        engine.open(request("two", "a"), Reader())
    run(engine, first)
    assert len(ask(engine, "two", "a").token_ids) == 16


def test_tokens_are_handed_out_while_the_next_step_computes(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = begin(engine, request("hello", max_tokens=12))
    waiting: dict[str, list[int]] = {"computed": [], "stepped": []}
    backend = engine._loop.runner._backend
    forward = backend.forward

    def note(when: str) -> None:
        waiting[when].append(reader._sent - len(reader.token_ids))

    def noted(*args: Any) -> torch.Tensor:
        logits = forward(*args)
        note("computed")
        return logits

    monkeypatch.setattr(backend, "forward", noted)
    with torch.inference_mode():
        for _ in range(12):
            engine._loop.step()
            note("stepped")
    assert waiting["computed"] == [0] * 12
    assert max(waiting["stepped"]) > 0
    assert waiting["stepped"][-1] == 0  # no step comes behind the last one, which its tokens would wait for
    assert reader.ended


def test_a_failing_step_fails_only_its_turns(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    create(engine, "a")
    ask(engine, LONG, "a")
    before = state(session(engine, "a"))
    reader = begin(engine, request("hello", "a"))
    step(engine, 3)
    with monkeypatch.context() as patch:
        patch.setattr(
            engine._loop.runner, "run", lambda *_: (_ for _ in ()).throw(ValueError("broken kernel"))
        )
        step(engine)
    assert isinstance(reader.error, errors.Internal)
    assert "broken kernel" not in str(reader.error)
    assert len(reader.error.metadata["incident"]) >= 8
    assert same(before, state(session(engine, "a")))
    assert len(ask(engine, "hello", "a").token_ids) == 16


def test_logits_that_are_not_finite_fail_their_own_turn_only(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers = [begin(engine, request("hello")), begin(engine, request("world"))]
    step(engine)
    real = engine._loop.runner.run

    def poisoned(*args: Any) -> torch.Tensor:
        logits = real(*args).clone()
        logits[0, 5] = float("nan")
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(engine._loop.runner, "run", poisoned)
        step(engine)
    run(engine, *readers)
    assert isinstance(readers[0].error, errors.Internal)
    assert readers[1].error is None
    assert leased(engine) == 0


def test_deadlines_are_kept_in_flight_and_in_queue(make_engine: MakeEngine) -> None:
    engine = make_engine(start=False, max_running=1)
    soon = time.monotonic() + 0.05
    running = begin(engine, request("hello", max_tokens=900, deadline=soon))
    queued = begin(engine, request("hello", deadline=soon))
    run(engine, running, queued)
    assert isinstance(running.error, errors.DeadlineExceeded)
    assert "in flight" in str(running.error)
    assert isinstance(queued.error, errors.DeadlineExceeded)
    assert "in queue" in str(queued.error)
    assert leased(engine) == 0


def test_the_queue_is_bounded(make_engine: MakeEngine) -> None:
    engine = make_engine(start=False, max_running=1, queue_limit=2)
    readers = [begin(engine, request("hello")), begin(engine, request("hello"))]
    with pytest.raises(errors.QueueFull) as refusal:
        engine.open(request("hello"), Reader())
    assert refusal.value.retry_after > 0
    step(engine)
    readers.append(begin(engine, request("hello")))
    run(engine, *readers)
    assert all(reader.error is None for reader in readers)


def test_the_queue_is_shared_by_the_weights_of_the_settings(make_engine: MakeEngine) -> None:
    engine = make_engine(start=False, max_running=1, queue_limit=4, tenant_weights="bees=3")
    first = begin(engine, request("hello", tenant="wasps"))
    step(engine)
    for id in "abcd":
        create(engine, id, tenant="wasps")
    wasps = [begin(engine, request("hello", id, tenant="wasps")) for id in "abcd"]
    bees = [begin(engine, request("hello", tenant="bees")) for _ in range(3)]
    for tenant in ("wasps", "bees"):
        with pytest.raises(errors.QueueFull):
            engine.open(request("hello", tenant=tenant), Reader())
    run(engine, first, *wasps, *bees)
    assert [type(reader.error) for reader in wasps] == [type(None), *3 * [errors.QueueFull]]
    assert all(reader.error is None for reader in (first, *bees))
    for id in "bcd":
        assert not session(engine, id, "wasps").busy
        assert session(engine, id, "wasps").turns == []


def test_a_deadline_that_cannot_be_met_is_refused_at_the_door(engine: Engine) -> None:
    create(engine, "a")
    for _ in range(10):  # evidence of what prefill costs
        ask(engine, LONG, "a", max_tokens=1)
    before, bytes_before = state(session(engine, "a")), leased(engine)
    hopeless = request(LONG * 50, "a", deadline=time.monotonic() + 0.01)
    with pytest.raises(errors.DeadlineExceeded, match="the deadline leaves"):
        engine.open(hopeless, Reader())
    assert engine.capacity().queued_turns == 0
    assert same(before, state(session(engine, "a")))
    assert leased(engine) == bytes_before
    assert ask(engine, LONG, "a", deadline=time.monotonic() + 60).error is None


def test_a_queued_turn_is_refused_when_it_is_too_late_to_start(make_engine: MakeEngine) -> None:
    engine = make_engine(start=False, max_running=1)
    for _ in range(10):
        ask(engine, LONG, max_tokens=1)
    blocker = begin(engine, request("hello", max_tokens=10_000))
    step(engine)
    seconds = engine._scheduler._costs.seconds(Work.of_chunk(256, 0)) * 4000 / 256
    waiting = begin(engine, request(LONG * 20, deadline=time.monotonic() + seconds))
    run(engine, waiting)
    assert isinstance(waiting.error, errors.DeadlineExceeded)
    assert "the deadline leaves" in str(waiting.error), "it was not let run into it"
    blocker.close()
    run(engine, blocker)


def test_a_stalled_reader_delays_nobody_and_loses_its_turn(engine: Engine) -> None:
    create(engine, "a")
    before = state(session(engine, "a"))
    stalled = begin(engine, request("hello", "a", max_tokens=500), reads=False, capacity=8, stall_limit=1.0)
    healthy = begin(engine, request("hello", max_tokens=60))
    run(engine, healthy)
    assert len(stalled.token_ids) == 8, "the turn pauses when its buffer is full"
    run(engine, stalled, steps=100_000)
    assert isinstance(stalled.error, errors.ReaderStalled)
    assert same(before, state(session(engine, "a")))
    assert leased(engine) == 0


def test_a_slow_reader_gets_everything(engine: Engine) -> None:
    fast = ask(engine, "hello", max_tokens=50)
    slow = begin(engine, request("hello", max_tokens=50), reads=False, capacity=8)
    while not slow.ended:
        step(engine)
        if slow.full:
            slow.read()
    assert slow.token_ids == fast.token_ids


def test_deleting_a_busy_session_cancels_its_turn(engine: Engine) -> None:
    create(engine, "a")
    ask(engine, "hello", "a")
    reader = begin(engine, request(LONG, "a", max_tokens=200))
    step(engine, 5)
    done = engine.keeper.delete("default", "a")
    step(engine)
    assert done.result(timeout=0) is None
    assert isinstance(reader.error, errors.Cancelled)
    assert leased(engine) == 0
    with pytest.raises(errors.SessionNotFound):
        engine.keeper.delete("default", "a")


def test_expired_sessions_give_their_memory_back(engine: Engine) -> None:
    create(engine, "a", ttl=0.05)
    ask(engine, "hello", "a")
    time.sleep(0.06)
    with pytest.raises(errors.SessionNotFound):
        engine.sessions.get("default", "a")
    step(engine)
    assert leased(engine) == 0
    assert engine.capacity().sessions == 0


def test_idle_sessions_are_parked_under_pressure_and_come_back_unchanged(make_engine: MakeEngine) -> None:
    engine = make_engine(start=False, cache_budget=86_144 + 4 * 14_080)  # a workspace and four slots
    assert engine.capacity().max_resident_sessions == 3
    for id in "abcdef":
        create(engine, id)
        ask(engine, f"I am {id}", id, max_tokens=25)
    capacity = engine.capacity()
    assert capacity.resident_sessions == 3
    assert capacity.parked_sessions == 3
    assert capacity.parked_bytes == 3 * capacity.slot_bytes
    roomy = make_engine(start=False)
    create(roomy, "a")
    ask(roomy, "I am a", "a", max_tokens=25)
    assert session(engine, "a").parked is not None
    parked, resident = ask(engine, "who?", "a", max_tokens=40), ask(roomy, "who?", "a", max_tokens=40)
    assert parked.token_ids == resident.token_ids
    assert parked.usage.cached_tokens == resident.usage.cached_tokens > 0
    for id in "abcdef":
        engine.keeper.delete("default", id)
    step(engine)
    assert leased(engine) == 0
    assert engine.capacity().parked_bytes == 0


def test_a_full_budget_is_a_typed_error(make_engine: MakeEngine) -> None:
    engine = make_engine(start=False, cache_budget=86_144 + 3 * 14_080, parked_budget=0)
    for id in "ab":
        create(engine, id)
        ask(engine, "hello", id)
    create(engine, "c")
    reader = ask(engine, "hello", "c")
    assert isinstance(reader.error, errors.BudgetExhausted)
    assert reader.error.retry_after > 0
    behind = [begin(engine, request("hello again", "a")), begin(engine, request("hello", "c"))]
    run(engine, *behind)
    assert behind[0].error is None, "its slot is there: not the one to refuse"
    assert isinstance(behind[1].error, errors.BudgetExhausted)
    engine.keeper.delete("default", "a")
    assert ask(engine, "hello", "c").error is None


def test_more_turns_than_memory_wait_for_each_other(make_engine: MakeEngine) -> None:
    engine = make_engine(start=False, cache_budget=86_144 + 4 * 14_080)
    for id in "abcdefgh":
        create(engine, id)
    for _ in range(3):
        readers = [begin(engine, request(LONG[:50], id, max_tokens=60)) for id in "abcdefgh"]
        run(engine, *readers)
        assert all(len(reader.token_ids) == 60 for reader in readers)
    assert engine.capacity().peak_bytes <= engine.capacity().budget_bytes


def test_a_full_cache_ends_with_length_and_refuses_more(engine: Engine) -> None:
    create(engine, "a", "full(bound=50)")
    reader = ask(engine, LONG[:30], "a", max_tokens=200)
    assert reader.deltas[-1].finish_reason is FinishReason.LENGTH
    assert engine.sessions.get("default", "a").entries == 50
    assert len(reader.token_ids) == 21  # the last one needs no entry of its own
    with pytest.raises(errors.ContextFull) as refusal:
        engine.open(request("more", "a"), Reader())
    assert refusal.value.metadata == {"cached": "50", "prompt": "5", "bound": "50"}
    assert engine.sessions.get("default", "a").state.value == "resident"


@pytest.mark.parametrize(
    "policy", ["huge", "buzz(stride=2)", "full(bound=100000)", "buzz(threshold=400)", "full(bound=1000)"]
)
def test_policies_that_cannot_be_served_are_refused_with_the_reason(
    make_engine: MakeEngine, policy: str
) -> None:
    engine = make_engine(start=False, cache_budget=86_144 + 4 * 14_080)
    with pytest.raises(errors.InvalidField) as refusal:
        engine.sessions.create("default", "a", policy, None, None, {})
    assert refusal.value.violations[0][0] == "policy"
    with pytest.raises(errors.InvalidField):
        engine.open(request("hello", policy=policy), Reader())


def test_stop_strings_leave_exactly_what_was_delivered(make_engine: MakeEngine) -> None:
    engine = make_engine(start=False)
    free = ask(engine, "hello", max_tokens=40)
    place = next(
        i
        for i in range(12, 30)
        if free.text[i : i + 3].isascii() and free.text.find(free.text[i : i + 3]) == i
    )
    stop = free.text[place : place + 3]
    create(engine, "a")
    stopped = ask(engine, "hello", "a", max_tokens=40, stop=(stop,))
    assert stopped.deltas[-1].finish_reason is FinishReason.STOP
    assert stopped.text == free.text[:place]
    count = len(stopped.token_ids)
    assert stopped.token_ids == free.token_ids[:count]
    assert stopped.usage.completion_tokens == count
    # the session goes on as one that was told to generate just that much
    create(engine, "b")
    ask(engine, "hello", "b", max_tokens=count)
    assert session(engine, "a").transcript == session(engine, "b").transcript
    on, control = ask(engine, " and", "a", max_tokens=30), ask(engine, " and", "b", max_tokens=30)
    assert on.token_ids == control.token_ids


def test_stop_tokens_and_end_of_turn_are_not_delivered(engine: Engine) -> None:
    free = ask(engine, "hello", max_tokens=20)
    stop = free.token_ids[7]
    stopped = ask(engine, "hello", max_tokens=20, stop_token_ids=(stop,))
    assert stopped.deltas[-1].finish_reason is FinishReason.STOP
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(stop)]


def test_chat_turns_close_the_reply_before_them(engine: Engine) -> None:
    create(engine, "a")
    first = ask(engine, [("user", "hi")], "a", max_tokens=5)
    ask(engine, [("user", "again")], "a", max_tokens=5)
    text = engine._door.tokenizer.backend.decode(
        session(engine, "a").transcript.tolist(), skip_special_tokens=False
    )
    opening = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    reply = engine._door.tokenizer.backend.decode(first.token_ids, skip_special_tokens=False)
    assert text.startswith(
        opening + reply + "<|im_end|>\n<|im_start|>user\nagain<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(errors.InvalidField, match="system"):
        engine.open(request([("system", "be rude"), ("user", "x")], "a"), Reader())
    assert engine.sessions.get("default", "a").state.value == "resident"


def test_logprobs_belong_to_their_tokens(engine: Engine) -> None:
    reader = ask(engine, "hello", max_tokens=12, logprobs=3)
    assert [logprob.token_id for logprob in reader.logprobs] == reader.token_ids
    assert all(logprob.logprob == pytest.approx(logprob.top[0][1]) for logprob in reader.logprobs), "greedy"
    assert all(len(logprob.top) == 3 for logprob in reader.logprobs)


def test_a_seed_gives_the_same_text_alone_and_in_a_batch(engine: Engine) -> None:
    sampling = Sampling(temperature=1.0, top_p=0.9, seed=7)
    alone = ask(engine, "hello", sampling=sampling, max_tokens=40)
    others = [
        begin(engine, request("x" * (5 + i), sampling=Sampling(temperature=1.0), max_tokens=10 + 9 * i))
        for i in range(5)
    ]
    step(engine, 2)
    together = begin(engine, request("hello", sampling=sampling, max_tokens=40))
    run(engine, together, *others)
    assert together.token_ids == alone.token_ids
    assert together.usage.seed == 7
    assert (
        ask(engine, "hello", sampling=Sampling(temperature=1.0, top_p=0.9, seed=8), max_tokens=40).token_ids
        != alone.token_ids
    )


def test_draining_refuses_new_turns_and_finishes_old_ones(engine: Engine) -> None:
    reader = begin(engine, request("hello"))
    engine.drain()
    with pytest.raises(errors.Draining):
        engine.open(request("hello"), Reader())
    run(engine, reader)
    assert reader.error is None


def test_stop_rolls_back_what_does_not_finish_in_time(make_engine: MakeEngine) -> None:
    engine = make_engine(start=False)
    create(engine, "a")
    reader = begin(engine, request("hello", "a", max_tokens=30_000))
    engine.start()
    engine.stop(grace=0.1)
    assert isinstance(reader.error, errors.Draining)
    assert session(engine, "a").cache is None


def test_a_step_that_hangs_costs_the_worker_its_health(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(start=False, step_limit=0.2)
    lost: list[bool] = []
    engine.on_unhealthy = lambda: lost.append(True)
    real = engine._loop.runner.run

    def slow(*args: Any) -> torch.Tensor:
        time.sleep(0.8)
        return real(*args)

    monkeypatch.setattr(engine._loop.runner, "run", slow)
    engine.start()
    begin(engine, request("hello", max_tokens=1))
    until = time.monotonic() + 5
    while not lost and time.monotonic() < until:
        time.sleep(0.02)
    assert lost == [True]
    assert not engine.healthy
    engine.stop(grace=0)


def test_the_observer_sees_plain_numbers(make_engine: MakeEngine) -> None:
    class Recorder(Observer):
        def __init__(self) -> None:
            self.steps: list[StepStats] = []
            self.turns: list[TurnStats] = []

        def step(self, stats: StepStats) -> None:
            self.steps.append(stats)

        def turn(self, stats: TurnStats) -> None:
            self.turns.append(stats)

    engine = make_engine(start=False)
    engine._loop._observer = recorder = Recorder()
    ask(engine, LONG, max_tokens=30, trace="mine")
    (turn,) = recorder.turns
    assert (turn.outcome, turn.prompt_tokens, turn.completion_tokens, turn.trace) == (
        "length",
        200,
        30,
        "mine",
    )
    assert turn.started is not None
    assert turn.first_token is not None
    assert turn.arrived <= turn.started <= turn.first_token <= turn.ended
    assert sum(stats.prefill_tokens for stats in recorder.steps) == 200
    assert sum(stats.decode_tokens for stats in recorder.steps) == 29
    assert sum(stats.evicted_entries for stats in recorder.steps) == turn.evicted_entries > 0
    assert sum(stats.compactions for stats in recorder.steps) >= 1


def test_a_turn_right_behind_a_cancel_waits_for_the_rollback(make_engine: MakeEngine) -> None:
    engine = make_engine()
    create(engine, "a")
    first = begin(engine, request(LONG, "a", max_tokens=1000))
    first.close()
    second = Reader()
    waiting = engine.open(request("hello", "a", max_tokens=1000), second)
    second.close()
    third = begin(engine, request("hello", "a", max_tokens=3))
    until = time.monotonic() + 10
    while not third.ended and time.monotonic() < until:
        time.sleep(0.01)
    assert isinstance(first.error, errors.Cancelled)
    with pytest.raises(errors.Cancelled):
        waiting.result(10)
    assert len(third.token_ids) == 3


def test_a_turn_that_nobody_can_give_a_second_slot_is_refused_and_blocks_nobody(
    make_engine: MakeEngine,
) -> None:
    small, large = "buzz(sink=2,window=8,threshold=20,stride=5)", "buzz(sink=2,window=60,threshold=60)"
    engine = make_engine(start=False, cache_budget=86_144 + 8 * 14_080, parked_budget=0)
    create(engine, "large", large)
    ask(engine, LONG, "large")
    for number in range(10):
        create(engine, f"s{number}", small)
        if ask(engine, "hello", f"s{number}").error is not None:
            break
    before = state(session(engine, "large"))
    behind = begin(engine, request(LONG, "large", max_tokens=40)), begin(engine, request("and you?", "s0"))
    run(engine, *behind)
    assert isinstance(behind[0].error, errors.BudgetExhausted)
    assert behind[1].error is None
    assert same(before, state(session(engine, "large")))
