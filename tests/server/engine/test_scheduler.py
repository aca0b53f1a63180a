"""Each rule of the scheduler by itself; `test_simulation.py` has them all together."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest

from apiary_server.engine.costs import Work
from apiary_server.engine.scheduler import Scheduler
from apiary_server.engine.step import StepPlan
from apiary_server.errors import DeadlineExceeded, QueueFull

from .simulation import Clock, FakeTurn, Memory


class Worker:
    """A scheduler, its clock and its memory; a step takes `seconds`, and `price` more for each token."""

    def __init__(
        self,
        *,
        step_tokens: int = 64,
        max_running: int = 8,
        queue_limit: int = 100,
        decode_slowdown: float = 1000.0,
        weights: Mapping[str, float] | None = None,
        memory: int = 100,
        seconds: float = 0.05,
        price: float = 0.0,
    ) -> None:
        self.clock, self.memory = Clock(), Memory(memory)
        self.scheduler = Scheduler(
            step_tokens, max_running, queue_limit, decode_slowdown, weights or {}, 5.0, self.clock
        )
        self._seconds, self._price = seconds, price

    def turn(self, prompt: int = 5, output: int = 1000, tenant: str = "a", **fields: Any) -> Any:
        """One that arrives now."""
        return FakeTurn(tenant, prompt, output, self.clock.now, self.memory, self.clock, **fields)

    def add(self, *args: Any, **fields: Any) -> Any:
        """Queue one that arrives now."""
        turn = self.turn(*args, **fields)
        assert self.scheduler.add(turn) is None
        return turn

    def step(self) -> StepPlan:
        """Schedule, and carry it out."""
        plan = self.scheduler.schedule()
        seconds = self._seconds + self._price * (plan.decode_tokens + plan.prefill_tokens)
        self.clock.now += seconds
        for chunk in plan.chunks:
            turn: Any = chunk.turn
            turn.advance(chunk.count)
            if turn.answered:
                turn.close("finished")
                self.scheduler.remove(turn)
        self.scheduler.observe(plan, seconds)
        return plan


def given(plan: StepPlan) -> list[tuple[Any, int]]:
    """Who has how many tokens of a step."""
    return [(chunk.turn, chunk.count) for chunk in plan.chunks]


# a step


def test_decode_goes_first_and_prefill_has_the_rest() -> None:
    worker = Worker(max_running=10)
    decoders = [worker.add(5) for _ in range(4)]
    worker.step()
    worker.step()
    long = worker.add(4000)
    plan = worker.step()
    assert given(plan) == [*((turn, 1) for turn in decoders), (long, 60)]
    assert (plan.decode_tokens, plan.prefill_tokens) == (4, 60)


def test_prefill_has_room_however_many_decode() -> None:
    worker = Worker(step_tokens=20, max_running=100)
    for _ in range(30):
        worker.add(1)
    while worker.step().prefill_tokens:
        pass
    worker.add(100)
    plan = worker.step()
    assert (plan.decode_tokens, plan.prefill_tokens) == (30, 16)


@pytest.mark.parametrize("slowdown", [1.5, 2.0, 3.0])
def test_a_step_beside_decode_is_cut_by_its_time(slowdown: float) -> None:
    """A token costs 1 ms, a step 20 ms: 10 decoders alone take 30 ms."""
    worker = Worker(step_tokens=256, max_running=20, decode_slowdown=slowdown, seconds=0.02, price=0.001)
    for _ in range(10):
        worker.add(20)
    for _ in range(40):
        worker.step()
    worker.add(3000)
    for _ in range(20):  # what it takes beside decode is learned by then
        worker.step()
    plans = [worker.step() for _ in range(10)]
    assert {plan.decode_tokens for plan in plans} == {10}
    assert max(plan.prefill_tokens for plan in plans) == pytest.approx(max(16, (slowdown - 1) * 30), rel=0.1)


def test_moving_caches_takes_the_time_of_a_step_beside_decode() -> None:
    """Those who come have their caches parked: bringing one back takes as long as a step."""

    class Parked(FakeTurn):
        def open(self) -> bool:
            self.clock.now += 0.05
            return super().open()

    worker = Worker(decode_slowdown=1.9)
    worker.add(5)
    for _ in range(10):
        worker.step()
    turns: list[Any] = [Parked("a", 5, 100, worker.clock.now, worker.memory, worker.clock) for _ in range(6)]
    for turn in turns:
        assert worker.scheduler.add(turn) is None
    started = []
    for _ in range(6):
        worker.step()
        started.append(sum(turn.started is not None for turn in turns))
    assert started == [1, 2, 3, 4, 5, 6]


def test_nothing_is_cut_where_nobody_decodes() -> None:
    worker = Worker(step_tokens=256, decode_slowdown=1.0, seconds=0.02, price=0.001)
    worker.add(2000)
    assert [worker.step().prefill_tokens for _ in range(3)] == [256, 144, 256]  # a segment has 400


def test_the_smallest_chunk_is_no_crumb() -> None:
    worker = Worker(step_tokens=40)
    worker.add(30)
    worker.add(90)
    assert [count for _, count in given(worker.step())] == [30], "10 would be left"
    worker.add(30)
    short = worker.add(6)
    plan = dict(given(worker.step()))
    assert plan[short] == 6, "unless it is all that a turn needs"


@pytest.mark.parametrize("after", [1.0, 30.0, 300.0])
@pytest.mark.parametrize("tenant", ["a", "b"])
def test_a_chats_next_turn_does_not_wait_behind_a_book(after: float, tenant: str) -> None:
    worker = Worker()
    book = worker.add(20_000)
    worker.clock.now = after
    worker.step()
    short = worker.add(30, tenant=tenant)
    assert given(worker.step())[0] == (short, 30)
    assert book.computed > 0


@pytest.mark.parametrize("price", [0.0, 0.01])
def test_a_book_goes_on_beside_chats(price: float) -> None:
    """A decoder leaves room for 16 tokens of prefill; three chats after each other always want it."""
    worker = Worker(decode_slowdown=1.0, seconds=0.05, price=price)
    worker.add(5, 10**6)
    worker.step()
    book, chats = worker.add(390), [worker.add(60, 1) for _ in range(3)]
    worker.clock.now += 10
    for _ in range(60):
        worker.step()
        chats = [chat if chat.end is None else worker.add(60, 1) for chat in chats]
    assert book.decoding


def test_a_prompt_that_waits_for_the_workspace_leaves_its_room_to_others() -> None:
    worker = Worker()
    worker.add(3000)
    worker.step()
    worker.add(3000)
    assert [count for _, count in given(worker.step())] == [64]


def test_who_waits_for_memory_is_named_and_nobody_overtakes_it() -> None:
    worker = Worker(memory=4)  # two of these are the reserve
    worker.add(5)
    worker.step()
    large, small = worker.add(5, size=2), worker.add(5)
    plan = worker.step()
    assert plan.blocked is large
    assert plan.prefill_tokens == 0
    assert small in worker.scheduler.waiting


def test_where_nothing_runs_those_with_room_overtake_it_for_a_while() -> None:
    worker = Worker(memory=3)  # the reserve, and what one session holds
    worker.memory.held, worker.clock.now = 1, 100.0
    blocked, first = worker.add(5), worker.add(5, 1, resident=True)
    assert given(worker.step()) == [(first, 5)]
    worker.memory.held = 1  # its session has it still
    worker.clock.now = 104.9
    second = worker.add(5, 1, resident=True)
    assert given(worker.step()) == [(second, 5)]
    worker.memory.held = 1
    worker.clock.now = 105.1
    worker.add(5, 1, resident=True)
    plan = worker.step()
    assert (given(plan), plan.blocked) == ([], blocked)


def test_few_are_read_at_once() -> None:
    """They hold slots meanwhile; those whose sessions are in memory start."""
    worker = Worker()
    reading = [worker.add(5, stored=True) for _ in range(6)]
    for turn in reading:
        turn.load = lambda turn=turn: turn.started is not None
        turn.open = lambda: True
    other = worker.add(6)
    assert given(worker.step()) == [(other, 6)]
    assert worker.scheduler.waiting == reading[4:]
    reading[0].started = worker.clock.now
    assert reading[0] in [turn for turn, _ in given(worker.step())]
    assert worker.scheduler.waiting == reading[5:]


def test_the_line_is_in_the_order_in_which_turns_would_start() -> None:
    worker = Worker(max_running=1)
    worker.add(5)
    worker.step()
    later, sooner = worker.add(5), worker.add(5, priority=3)
    worker.step()
    assert worker.scheduler.line() == [sooner, later]


# tenants


def served(worker: Worker, prompt: int, output: int, rounds: int) -> Counter[str]:
    """Tokens that two tenants got of which one asks ten times as much."""
    tokens = Counter[str]()
    for _ in range(rounds):
        for tenant, many in (("big", 40), ("small", 4)):
            while sum(turn.tenant == tenant for turn in worker.scheduler.waiting) < many:
                worker.add(prompt, output, tenant)
        for turn, count in given(worker.step()):
            tokens[turn.tenant] += count
    return tokens


@pytest.mark.parametrize(("prompt", "output"), [(50, 2), (90, 1), (10, 30), (2000, 1)])
@pytest.mark.parametrize("weights", [{}, {"big": 3.0}, {"small": 4.0}, {"big": 0.5, "small": 2.0}])
def test_weights_set_the_shares(prompt: int, output: int, weights: dict[str, float]) -> None:
    """However much one asks, and whether turns prefill or decode. Prompts of 2,000 take the one workspace in
    turn, 400 tokens at a time."""
    tokens = served(Worker(step_tokens=32, max_running=4, weights=weights), prompt, output, 1000)
    share = weights.get("big", 1.0) / weights.get("small", 1.0)
    assert tokens["big"] / tokens["small"] == pytest.approx(share, rel=0.2)


def test_one_step_may_serve_several_turns_of_the_tenant_behind() -> None:
    worker = Worker(step_tokens=64, max_running=20)
    for tenant in "ab":
        for _ in range(5):
            worker.add(10, tenant=tenant)
    assert Counter(turn.tenant for turn, _ in given(worker.step())) == {"a": 3, "b": 3}


def test_a_tenant_that_was_away_starts_level() -> None:
    worker = Worker(step_tokens=32)
    worker.add(5, 1, "b")
    worker.step()
    for _ in range(50):
        worker.add(60, 1)
        worker.step()
    tokens = Counter[str]()
    for _ in range(20):
        for tenant in "ab":
            worker.add(60, 1, tenant)
        for turn, count in given(worker.step()):
            tokens[turn.tenant] += count
    assert tokens["b"] <= tokens["a"] + 3 * 32, "it was away, and has no credit for that"


def test_a_tenant_whose_readers_pause_gets_no_credit() -> None:
    worker = Worker(step_tokens=32, queue_limit=1000)
    paused = worker.add(5, tenant="b", pause=(0.0, 1000.0))
    for _ in range(200):
        worker.add(60, 1)
        worker.step()
    assert paused.computed == 5
    newcomers = Counter[str]()
    for number in range(100):  # each a tenant of its own, that could take the credit over
        worker.add(60, 1, f"new-{number}")
        for turn, count in given(worker.step()):
            newcomers["a" if turn.tenant == "a" else "new"] += count
    assert newcomers["a"] > 0


def test_clocks_of_tenants_that_are_gone_are_forgotten() -> None:
    worker = Worker()
    worker.add(5, 10**6, "stays")
    for number in range(300):
        worker.add(1, 1, f"tenant-{number}")
        worker.step()
    assert len(worker.scheduler._served) < 50


# priority


def test_priority_goes_first_and_waiting_catches_up() -> None:
    worker = Worker(max_running=1)
    low, high = worker.add(5, 2), worker.add(5, 2, priority=10)
    assert given(worker.step()) == [(high, 5)]
    worker.step()
    worker.clock.now = 60.0
    worker.add(5, 2, priority=10)
    assert given(worker.step()) == [(low, 5)]


def test_priority_counts_within_a_tenant_alone() -> None:
    worker = Worker(max_running=1)
    worker.add(50, 2, priority=100)
    worker.step()
    other = worker.add(50, 2, "b", priority=-100)
    worker.add(50, 2, priority=100)
    worker.step()
    assert given(worker.step())[0][0] is other


# the queue


def test_a_full_queue_refuses_with_a_time() -> None:
    worker = Worker(max_running=1, queue_limit=2)
    running = worker.add(5, 10**6)
    worker.step()
    for _ in range(2):
        worker.add(5)
    with pytest.raises(QueueFull, match=r"2 turns may wait, and do; 2 of them are this tenant's") as refusal:
        worker.scheduler.check_queue("a", {})
    assert refusal.value.metadata == {"limit": "2"}
    assert 0 < refusal.value.retry_after <= 1
    worker.clock.now += 30  # nobody has started since
    with pytest.raises(QueueFull) as refusal:
        worker.scheduler.check_queue("a", {})
    assert refusal.value.retry_after >= 30
    running.close("cancelled")
    worker.scheduler.remove(running)
    worker.step()
    worker.scheduler.check_queue("a", {})


def test_turns_on_their_way_count() -> None:
    worker = Worker(queue_limit=2)
    worker.add(5)
    worker.scheduler.check_queue("a", {})
    with pytest.raises(QueueFull):
        worker.scheduler.check_queue("a", {"a": 1})
    with pytest.raises(QueueFull):
        worker.scheduler.check_queue("b", {"b": 1})


def test_turns_on_their_way_displace_others_no_more_than_their_share() -> None:
    worker = Worker(queue_limit=4)
    for _ in range(4):
        worker.add(5)
    worker.scheduler.check_queue("b", {"b": 1})
    with pytest.raises(QueueFull, match=r"4 turns may wait, and do; 2 of them are this tenant's"):
        worker.scheduler.check_queue("b", {"b": 2})
    worker.scheduler.check_queue("c", {"b": 2})
    with pytest.raises(QueueFull):
        worker.scheduler.check_queue("a", {"b": 2, "c": 1})


def test_the_time_to_retry_is_what_a_place_takes() -> None:
    """A turn takes 10 steps, so a place becomes free every second."""
    worker = Worker(max_running=1, queue_limit=5, seconds=0.1)
    refusals = []
    for _ in range(1000):
        try:
            worker.scheduler.check_queue("a", {})
        except QueueFull as refusal:
            refusals.append(refusal.retry_after)
        else:
            worker.add(5, 10)
        worker.step()
    assert len(refusals) > 600
    assert all(0.95 < seconds < 1.05 for seconds in refusals[-300:])


def test_the_heaviest_tenant_makes_way() -> None:
    worker = Worker(max_running=1, queue_limit=4)
    worker.add(5)
    worker.step()
    flood = [worker.add(5) for _ in range(4)]
    worker.scheduler.check_queue("b", {})
    newcomer = worker.turn(5, tenant="b")
    out = worker.scheduler.add(newcomer)
    assert out is not None
    assert out[0] is flood[-1], "the last in line"
    assert isinstance(out[1], QueueFull)
    worker.scheduler.remove(out[0])
    worker.scheduler.check_queue("b", {})
    assert worker.scheduler.add(worker.turn(5, tenant="b"))[0] is flood[-2]  # type: ignore[index]
    worker.scheduler.remove(flood[-2])
    with pytest.raises(QueueFull):  # two each: it would be the heaviest itself
        worker.scheduler.check_queue("b", {})


def test_weights_are_shares_of_the_queue_too() -> None:
    worker = Worker(max_running=1, queue_limit=6, weights={"b": 2.0})
    worker.add(5)
    worker.step()
    for _ in range(6):
        worker.add(5)
    for _ in range(4):
        worker.scheduler.check_queue("b", {})
        out = worker.scheduler.add(worker.turn(5, tenant="b"))
        assert out is not None
        worker.scheduler.remove(out[0])
    assert Counter(turn.tenant for turn in worker.scheduler.waiting) == {"a": 2, "b": 4}
    with pytest.raises(QueueFull):
        worker.scheduler.check_queue("b", {})


# deadlines


@pytest.fixture
def experienced() -> Worker:
    """Has prefilled a while, at 1 ms a token, and is idle."""
    worker = Worker(step_tokens=100, max_running=2, seconds=0.0, price=0.001)
    for number in range(20):
        worker.add(20 + 4 * number, 1)
        worker.step()
    assert not worker.scheduler.running
    return worker


def late(worker: Worker, seconds: float, prompt: int, tenant: str = "a", **fields: Any) -> bool:
    """Whether a turn is refused that has so many seconds."""
    turn = worker.turn(prompt, tenant=tenant, deadline=worker.clock.now + seconds, **fields)
    try:
        worker.scheduler.check_deadline(turn)
    except DeadlineExceeded:
        return True
    return False


def test_a_deadline_that_cannot_be_met_is_refused(experienced: Worker) -> None:
    assert not late(experienced, 2.3, 4000), "it would take 4 s, and half of that is enough"
    assert late(experienced, 1.7, 4000)
    turn = experienced.turn(4000, deadline=experienced.clock.now + 1.5)
    with pytest.raises(DeadlineExceeded, match=r"about 4\.\d s, and the deadline leaves 1\.5 s") as refusal:
        experienced.scheduler.check_deadline(turn)
    assert float(refusal.value.metadata["needed"]) == pytest.approx(4.0, rel=0.1)
    assert refusal.value.metadata["left"] == "1.500"


def test_without_evidence_nobody_is_refused() -> None:
    worker = Worker()
    assert not late(worker, 0.001, 100_000)
    worker.add(5, 20)
    for _ in range(20):  # one of prefill, the others decode
        worker.step()
    assert not late(worker, 0.001, 100_000)


def test_what_goes_first_counts(experienced: Worker) -> None:
    for _ in range(2):
        experienced.add(20_000, priority=50)
    assert not late(experienced, 1.2, 2000, priority=60)
    assert late(experienced, 2.7, 2000), "as much of each as of itself"
    assert not late(experienced, 3.4, 2000)


@pytest.mark.parametrize(("weight", "needed"), [(0.5, 0.75), (1.0, 1.0), (9.0, 1.0)])
def test_other_tenants_count_by_their_weights(experienced: Worker, weight: float, needed: float) -> None:
    experienced.scheduler._weights = {"b": weight}
    experienced.add(50_000, tenant="b")
    for _ in range(2):
        experienced.step()
    assert late(experienced, 0.85 * needed, 1000)
    assert not late(experienced, 1.15 * needed, 1000)


def test_queued_turns_are_refused_when_it_is_too_late_to_start(experienced: Worker) -> None:
    turn = experienced.turn(2000, deadline=experienced.clock.now + 1.5)
    experienced.scheduler.check_waiting(turn)
    experienced.clock.now += 0.6
    with pytest.raises(DeadlineExceeded):
        experienced.scheduler.check_waiting(turn)


def test_a_plan_says_what_it_costs() -> None:
    worker = Worker()
    worker.add(5)
    worker.step()
    worker.step()
    worker.add(40)
    assert worker.step().work == Work(rows=1, tokens=40, pairs=800.0)


def test_the_scheduler_needs_no_torch() -> None:
    code = "import apiary_server.engine.scheduler, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
