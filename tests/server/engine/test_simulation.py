"""The scheduler's promises, in a thousand random worlds."""

from __future__ import annotations

import itertools
from collections import Counter
from statistics import median
from typing import Any

import pytest

from apiary_server.engine.costs import Work
from apiary_server.engine.step import StepPlan

from .simulation import RESERVE, FakeTurn, Simulation, World, backlogged, mixed

WORLDS = 1000
BLOCKS = 10  # of worlds, so that a failure names few
LEAST = 16  # tokens of prefill for which every step has room


class Watch:
    """Looks at every step of a world."""

    def __init__(self) -> None:
        self.stretch: list[float] = []  # true seconds of steps with prefill, in parts of what they may take
        self._started: set[int] = set()
        self._before: tuple[set[Any], set[Any]] = set(), set()

    def __call__(self, simulation: Simulation, plan: StepPlan) -> None:
        self._shares(simulation, plan)
        self._budgets(simulation, plan)
        self._idle_room(simulation, plan)
        self._starts(simulation)
        self._alternate(simulation, plan)

    def _shares(self, simulation: Simulation, plan: StepPlan) -> None:
        chunks: list[tuple[Any, int]] = [(chunk.turn, chunk.count) for chunk in plan.chunks]
        given = {id(turn): count for turn, count in chunks}
        assert len(given) == len(chunks), "a turn is scheduled once a step"
        for turn, count in chunks:
            assert 1 <= count <= turn.segment_end - turn.computed
            assert not turn.paused
        for turn in simulation.scheduler.running:
            if turn.decoding and not turn.paused and not turn.starved:
                assert given[id(turn)] == 1, "whoever decodes does so in every step"
        decode = sum(count for turn, count in chunks if turn.decoding)
        assert (plan.decode_tokens, plan.prefill_tokens) == (decode, sum(given.values()) - decode)

    def _budgets(self, simulation: Simulation, plan: StepPlan) -> None:
        world, scheduler = simulation.world, simulation.scheduler
        assert len(scheduler.running) <= world.max_running
        assert len(scheduler.waiting) <= world.queue_limit
        assert world.memory.held <= world.memory.bytes
        least = min(LEAST, world.step_tokens)
        assert plan.prefill_tokens <= max(least, world.step_tokens - plan.decode_tokens)
        if plan.decode_tokens and plan.prefill_tokens > least:
            alone, costs = Work(rows=plan.decode_tokens), scheduler._costs
            assert costs.seconds(plan.work) <= world.slowdown * costs.seconds(alone) * (1 + 1e-9)
            if simulation.steps > 50:
                self.stretch.append(world.seconds(plan.work) / (world.slowdown * world.seconds(alone)))

    def _idle_room(self, simulation: Simulation, plan: StepPlan) -> None:
        """Where nothing is prefilled, nothing can be."""
        if plan.prefill_tokens:
            return
        world, running = simulation.world, simulation.scheduler.running
        for turn in running:
            if not turn.decoding and not turn.paused:
                assert not turn.begin_segment(), "it has memory, and gets no token"
        assert (
            not simulation.scheduler.waiting
            or len(running) == world.max_running
            or any(turn.starved and not turn.paused for turn in running)
            or plan.blocked in simulation.scheduler.waiting
        ), "a turn could start, and does not"
        blocked: Any = plan.blocked
        assert blocked is None or world.memory.held + blocked.size + RESERVE > world.memory.bytes

    def _starts(self, simulation: Simulation) -> None:
        """Within a tenant the highest level starts first: one of priority is worth a second of waiting, or
        512 tokens of prompt."""

        def level(turn: Any) -> float:
            waited: float = simulation.clock.now - turn.arrived
            return turn.priority + waited - turn.remaining / 512  # type: ignore[no-any-return]

        for turn in simulation.scheduler.running:
            if id(turn) not in self._started:
                self._started.add(id(turn))
                for other in simulation.scheduler.waiting:
                    assert other.tenant != turn.tenant or level(other) <= level(turn) + 1e-9

    def _alternate(self, simulation: Simulation, plan: StepPlan) -> None:
        """Nobody prefills in two steps, one after the other, while another turn of its tenant could and does
        in none of them."""
        turns: list[Any] = [turn for turn in simulation.scheduler.running if not turn.decoding]
        given: set[Any] = {chunk.turn for chunk in plan.chunks}
        idle = {turn for turn in turns if turn not in given and turn.computed < turn.segment_end}
        prefilled = {turn for turn in turns if turn in given}
        for turn in prefilled & self._before[0]:
            assert not any(other.tenant == turn.tenant for other in idle & self._before[1])
        self._before = prefilled, idle


def check_ends(world: World) -> None:
    """Everyone who was let in and did not go away has been served; what was held is free."""
    assert world.memory.held == 0
    assert world.memory.workspace is None
    for turn in world.turns:
        if turn.end == "finished":
            assert turn.computed == turn.prompt + turn.output - 1
        elif turn.end == "cancelled":
            assert turn.cancelled <= turn.ended
        elif turn.end == "expired":
            assert turn.deadline <= turn.ended
        elif turn.end == "late":
            assert turn.first_token is None
            assert turn.ended < turn.deadline
        else:
            check_refusal(world, turn)


def check_refusal(world: World, turn: FakeTurn) -> None:
    """The queue refuses when it is full, and never a tenant with less than its share of it."""
    assert turn.end in ("full", "displaced")
    assert turn.started is None
    queue = turn.queue + Counter([turn.tenant])
    assert queue.total() > world.queue_limit
    shares = sum(world.weights[tenant] for tenant in queue)
    assert queue[turn.tenant] >= (world.queue_limit + 1) * world.weights[turn.tenant] / shares


@pytest.mark.parametrize("block", range(BLOCKS))
def test_nobody_starves_and_every_budget_holds(block: int) -> None:
    ends = Counter[str]()
    stretch: list[float] = []
    for seed in range(block * WORLDS // BLOCKS, (block + 1) * WORLDS // BLOCKS):
        watch = Watch()
        simulation = Simulation(mixed(seed), watch=watch)
        simulation.run()
        check_ends(simulation.world)
        ends.update(str(turn.end) for turn in simulation.world.turns)
        stretch += watch.stretch
    assert min(ends[end] for end in ("finished", "cancelled", "expired", "late", "full", "displaced")) >= 5
    assert 0.8 < median(stretch) < 1.25, "what a step costs is learned, although its time is noisy"


class Shares:
    """Counts what tenants get while all of them wait for more.

    A tenant is ahead of another by what its turns in flight compute, at the most: they were started when it
    was not ahead. By as much it may be ahead when the counting begins.
    """

    def __init__(self) -> None:
        self.most = 0.0  # lead, in parts of what may be
        self._served = Counter[str]()
        self._waiting: set[str] = set()

    def __call__(self, simulation: Simulation, plan: StepPlan) -> None:
        world, waiting = simulation.world, {turn.tenant for turn in simulation.scheduler.waiting}
        if not waiting <= self._waiting:
            self._served.clear()
        self._waiting = waiting
        for chunk in plan.chunks:
            self._served[chunk.turn.tenant] += chunk.count
        longest = max(turn.prompt + turn.output for turn in world.turns)
        for one, other in itertools.permutations(waiting, 2):
            lead = self._served[one] / world.weights[one] - self._served[other] / world.weights[other]
            self.most = max(self.most, lead / (2 * world.max_running * longest / world.weights[one]))


def test_shares_follow_the_weights_while_tenants_have_more_to_ask() -> None:
    leads = []
    for seed in range(WORLDS // 10):
        shares = Shares()
        Simulation(backlogged(seed), watch=shares).run()
        leads.append(shares.most)
    assert max(leads) <= 1
    assert median(leads) > 0.1, "else the bound says little"


def test_a_deadline_refuses_nobody_who_would_have_made_it() -> None:
    """Run again with the first refused turn let in: its first token comes late, by far."""
    refused = 0
    for seed in range(WORLDS // 4):
        world = mixed(seed)
        Simulation(world, noise=False).run()
        place = next((place for place, turn in enumerate(world.turns) if turn.end == "late"), None)
        if place is None:
            continue
        again = mixed(seed)
        Simulation(again, noise=False, patient=frozenset([place])).run()
        turn, let_in = world.turns[place], again.turns[place]
        assert turn.deadline is not None
        assert turn.ended is not None
        if let_in.first_token is not None:  # else it was cancelled, or refused by the queue
            refused += 1
            assert let_in.first_token - turn.ended > 1.5 * (turn.deadline - turn.ended), seed
    assert refused > 20


def test_the_same_load_gives_the_same_schedule() -> None:
    for seed in range(0, WORLDS, 50):
        first, again = mixed(seed), mixed(seed)
        Simulation(first).run()
        Simulation(again).run()
        assert [turn.chunks for turn in first.turns] == [turn.chunks for turn in again.turns]
        assert [turn.end for turn in first.turns] == [turn.end for turn in again.turns]
