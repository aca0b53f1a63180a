"""The scheduler in a virtual world: random loads, a clock that a step's cost moves on, counters for turns,
memory that comes and goes. The same seed is the same world."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from apiary_server.engine.costs import Work
from apiary_server.engine.scheduler import Scheduler
from apiary_server.engine.step import StepPlan
from apiary_server.errors import DeadlineExceeded, QueueFull

SLACK = 100  # tokens of a prompt that need no workspace
WORKSPACE = 400  # tokens that one takes at once
RESERVE = 2  # bytes that admission leaves to running turns, as much as the largest needs


class Clock:
    """Virtual seconds."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(eq=False)
class Memory:
    """Bytes for turns' slots, and one workspace for prompts that are long."""

    bytes: int
    held: int = 0
    workspace: FakeTurn | None = None


@dataclass(eq=False)
class FakeTurn:
    """What the scheduler may see of a turn, and what becomes of it.

    `size` is that of a slot, which its session has already where it is `resident`; `second` is how many
    tokens it computes before it needs another; `pause` is a time in which its reader takes nothing. `end`
    says how it ended: "finished", "cancelled", "expired" (its deadline passed in flight or in queue), "late"
    (refused because it would), "full" (refused by the queue), "displaced". `queue` is how many turns of each
    tenant were in the queue when it was refused by it, without itself.
    """

    tenant: str
    prompt: int
    output: int
    arrived: float
    memory: Memory
    clock: Clock = field(default_factory=Clock)
    priority: int = 0
    size: int = 1
    deadline: float | None = None
    cancelled: float = math.inf
    second: float = math.inf
    pause: tuple[float, float] = (math.inf, math.inf)

    computed: int = 0
    segment_end: int = 0
    known: int = 0
    held: int = 0
    starved: bool = False
    resident: bool = False
    stored: bool = False
    replaying: bool = False
    started: float | None = None
    first_token: float | None = None
    end: str | None = None
    queue: Counter[str] = field(default_factory=Counter)
    ended: float | None = None
    chunks: list[tuple[float, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.known = self.prompt

    @property
    def request(self) -> FakeTurn:
        return self

    @property
    def decoding(self) -> bool:
        return self.computed >= self.prompt

    @property
    def remaining(self) -> int:
        return self.known - self.computed

    @property
    def context(self) -> int:
        return min(self.computed, WORKSPACE)

    @property
    def tokens(self) -> range:
        return range(self.known)

    @property
    def paused(self) -> bool:
        start, end = self.pause
        return self.first_token is not None and start <= self.clock.now < end

    def open(self) -> bool:
        if not self.resident:
            if self.memory.held + self.size + RESERVE > self.memory.bytes:
                return False
            self.memory.held += self.size
        self.held = self.size
        self.started = self.clock.now
        return True

    def load(self) -> bool:
        return True

    def begin_segment(self) -> bool:
        if self.computed < self.segment_end:
            return True
        memory = self.memory
        if self.held == self.size and self.computed >= self.second:
            self.starved = memory.held + self.size > memory.bytes
            if self.starved:
                return False
            memory.held += self.size
            self.held += self.size
        left = (self.known if self.decoding else self.prompt) - self.computed
        if left > SLACK:
            if memory.workspace not in (None, self):
                return False
            memory.workspace = self
            left = min(left, WORKSPACE)
        self.segment_end += left
        return True

    def advance(self, count: int) -> None:
        """Compute a chunk; its last known token gives the next one."""
        self.chunks.append((self.clock.now, count))
        self.computed += count
        if self.computed == self.segment_end and self.memory.workspace is self:
            self.memory.workspace = None
        if self.computed == self.known:
            self.known += 1
            if self.first_token is None:
                self.first_token = self.clock.now

    @property
    def answered(self) -> bool:
        return self.known - self.prompt >= self.output

    def close(self, how: str) -> None:
        """End, and give everything back."""
        self.end, self.ended = how, self.clock.now
        self.memory.held -= self.held
        self.held = 0
        if self.memory.workspace is self:
            self.memory.workspace = None


@dataclass
class World:
    """A worker, its machine and its load."""

    seed: int
    turns: list[FakeTurn]
    memory: Memory
    clock: Clock
    step_tokens: int
    max_running: int
    queue_limit: int
    slowdown: float
    weights: dict[str, float]
    prices: tuple[float, float, float, float]

    def seconds(self, work: Work) -> float:
        """What a step truly costs."""
        counts = (1.0, work.rows, work.tokens, work.pairs)
        return sum(price * count for price, count in zip(self.prices, counts, strict=True))


def machine(chance: random.Random) -> tuple[float, float, float, float]:
    """A fast or a slow one: seconds a step, a decode token, a prefill token, a pair of the attention."""
    token = 10 ** chance.uniform(-4, -2)
    pair = token * 10 ** chance.uniform(-4, -3)
    return token * chance.uniform(2, 30), token * chance.uniform(0.5, 2), token, pair


def mixed(seed: int) -> World:
    """Whatever may come: tenants, priorities, short and long prompts, cancels, deadlines, slow readers."""
    chance, clock = random.Random(seed), Clock()
    prices = machine(chance)
    memory = Memory(bytes=chance.randint(4, 16))
    span = chance.choice([0.0, 500, 3000]) * prices[2]  # in which the turns arrive, in prefill tokens
    turns = []
    for _ in range(chance.randint(1, 30)):
        arrived = chance.uniform(0, span)
        turn = FakeTurn(
            tenant=chance.choice("abc"),
            prompt=chance.choice([1, 20, 60, 90, 300, 1200]),
            output=chance.choice([1, 2, 8, 40]),
            arrived=arrived,
            memory=memory,
            clock=clock,
            priority=chance.choice([0, 0, 0, 5, -5, 100]),
            size=chance.choice([1, 1, 1, 2]),
        )
        if chance.random() < 0.2:
            turn.second = chance.randint(0, turn.prompt + turn.output - 1)
        if chance.random() < 0.15:
            turn.cancelled = arrived + chance.expovariate(1 / (300 * prices[2]))
        if chance.random() < 0.2:
            turn.deadline = arrived + chance.expovariate(1 / (1000 * prices[2]))
        if chance.random() < 0.1:
            begin = arrived + chance.expovariate(1 / (300 * prices[2]))
            turn.pause = begin, begin + chance.expovariate(1 / (300 * prices[2]))
        turns.append(turn)
    return World(
        seed=seed,
        turns=turns,
        memory=memory,
        clock=clock,
        step_tokens=chance.choice([4, 64, 256]),
        max_running=chance.randint(1, 12),
        queue_limit=chance.choice([2, 5, 100]),
        slowdown=chance.choice([1.0, 1.5, 2.0, 4.0]),
        weights=dict(zip("abc", chance.choices([0.5, 1, 1, 2, 5], k=3), strict=True)),
        prices=prices,
    )


def backlogged(seed: int) -> World:
    """Two or three tenants that have more to ask than the worker can answer; one may come later."""
    chance, clock = random.Random(seed), Clock()
    memory = Memory(bytes=100)
    tenants = "abc"[: chance.randint(2, 3)]
    longest = chance.choice([30, 90])
    prices = machine(chance)
    arrived = dict.fromkeys(tenants, 0.0) | {"a": chance.choice([0, 3000]) * prices[2]}
    turns = [
        FakeTurn(tenant, chance.randint(1, longest), chance.randint(1, 3), arrived[tenant], memory, clock)
        for tenant in tenants
        for _ in range(3600 // longest)
    ]
    return World(
        seed=seed,
        turns=turns,
        memory=memory,
        clock=clock,
        step_tokens=chance.choice([32, 128]),
        max_running=chance.randint(1, 3),
        queue_limit=1000,
        slowdown=2.0,
        weights=dict(zip(tenants, chance.choices([0.5, 1, 2, 4], k=len(tenants)), strict=True)),
        prices=prices,
    )


class Simulation:
    """A world and the scheduler in it.

    Args:
        world: it is used up.
        noise: whether steps take longer or shorter than they should.
        patient: turns (by their places) that are never refused for their deadlines, and outlive them.
        watch: sees each plan before it is carried out.
    """

    def __init__(
        self,
        world: World,
        *,
        noise: bool = True,
        patient: frozenset[int] = frozenset(),
        watch: Callable[[Simulation, StepPlan], None] = lambda _simulation, _plan: None,
    ) -> None:
        self.world, self.clock = world, world.clock
        self.scheduler = Scheduler(
            step_tokens=world.step_tokens,
            max_running=world.max_running,
            queue_limit=world.queue_limit,
            decode_slowdown=world.slowdown,
            weights=world.weights,
            clock=world.clock,
        )
        for place in patient:
            world.turns[place].deadline = None
        self.steps = 0
        self._chance = random.Random(f"{world.seed} noise") if noise else None
        self._watch = watch
        self._coming = sorted(world.turns, key=lambda turn: turn.arrived)
        self._arriving: list[FakeTurn] = []

    def run(self) -> None:
        """Until all turns have ended."""
        self._arrive(self.clock.now)
        while True:
            self._end_lost()
            plan = self.scheduler.schedule()
            self._watch(self, plan)
            if plan.chunks:
                self._execute(plan)
            elif not self._wait():
                return

    def end(self, turn: Any, how: str) -> None:
        """A turn that was queued ends."""
        turn.close(how)
        self.scheduler.remove(turn)

    def _execute(self, plan: StepPlan) -> None:
        self.steps += 1
        assert self.steps < 20_000, "somebody starves"
        seconds = self.world.seconds(plan.work)
        if self._chance is not None:
            seconds *= self._chance.lognormvariate(0, 0.15)
            seconds *= self._chance.uniform(2, 10) if self._chance.random() < 0.02 else 1
        self._arrive(self.clock.now + seconds)
        self.scheduler.observe(plan, seconds)
        for chunk in plan.chunks:
            turn: Any = chunk.turn
            turn.advance(chunk.count)
            if turn.answered:
                self.end(turn, "finished")

    def _arrive(self, until: float) -> None:
        """Time goes on, and those who come meanwhile are let in or refused when they come; they are queued
        when the step is over."""
        here: list[FakeTurn] = []
        while self._coming and self._coming[0].arrived <= until:
            turn = self._coming.pop(0)
            self.clock.now = turn.arrived
            arriving = Counter(other.tenant for other in here)
            turn.queue = arriving + Counter(other.tenant for other in self.scheduler.waiting)
            try:
                self.scheduler.check_queue(turn.tenant, arriving)
                self.scheduler.check_deadline(turn)  # type: ignore[arg-type]
            except (QueueFull, DeadlineExceeded) as error:
                turn.close("full" if isinstance(error, QueueFull) else "late")
            else:
                here.append(turn)
        self.clock.now = until
        for turn in here:
            leaving = self.scheduler.add(turn)  # type: ignore[arg-type]
            if leaving is not None:
                out: Any = leaving[0]
                self.end(out, "displaced")
                out.queue = Counter(other.tenant for other in self.scheduler.waiting)

    def _end_lost(self) -> None:
        now = self.clock.now
        turns: list[Any] = [*self.scheduler.running, *self.scheduler.waiting]
        for turn in turns:
            if now >= turn.cancelled:
                self.end(turn, "cancelled")
            elif turn.deadline is not None and now >= turn.deadline:
                self.end(turn, "expired")
            elif turn.started is None:
                try:
                    self.scheduler.check_waiting(turn)
                except DeadlineExceeded:
                    self.end(turn, "late")

    def _wait(self) -> bool:
        """Go on to the next event; False if there is none."""
        turns: list[Any] = [*self.scheduler.running, *self.scheduler.waiting]
        events = [turn.arrived for turn in self._coming[:1]]
        for turn in turns:
            events += [turn.cancelled, *turn.pause, math.inf if turn.deadline is None else turn.deadline]
        ahead = [time for time in events if self.clock.now < time < math.inf]
        if not ahead:
            assert not turns, "turns are left, and nothing will ever happen"
            return False
        self._arrive(min(ahead))
        return True
