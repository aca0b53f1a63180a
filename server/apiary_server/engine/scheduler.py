"""What runs next, and who may wait. No torch here: turns are counters, and their memory says yes or not yet.

*A step.* Every decoding turn takes its token. Prefill chunks take the room beside them: what fits the token
budget and, where others decode, makes the step at most `decode_slowdown` times as long as their tokens alone
(`Costs` learns how long that is). Tenants share the room by weighted fair queueing (start-time fair queueing,
Goyal et al., SIGCOMM 1996): a tenant's clock advances by the tokens that it computes, divided by its weight,
and the tenant whose clock is behind goes first. Within a tenant higher priority goes first; waiting raises
it, so nobody starves, and a long prompt lowers it. Who prefilled in the step before lets the others go first:
a book leaves every other step to a chat's next turn.

*The queue* is bounded. When it is full, the tenant with the most waiting turns for its weight is refused: its
newcomers at once, and for another tenant's newcomer its last turn has to leave (longest queue drop, McKenney,
INFOCOM 1990). A turn whose first token cannot come before its deadline is refused, too.
"""

from __future__ import annotations

import heapq
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING

from apiary_server.engine.costs import Costs, Work
from apiary_server.engine.step import ScheduledChunk, StepPlan
from apiary_server.errors import DeadlineExceeded, QueueFull

if TYPE_CHECKING:
    from apiary_server.engine.turn import Turn

_LEVEL_SECONDS = 1.0  # waiting that is worth a level of priority
_LEVEL_TOKENS = 512  # tokens of prompt that cost one
_LEAST_CHUNK = 16  # tokens that a step has for prefill, whatever it costs; and no chunk is cut smaller
_OPTIMISM = 0.5  # of the time that a first token should take: only what misses even that is refused
_MOST_LOADING = 4  # turns whose sessions' caches are being read
_PACE_GAIN = 0.2  # of the newest gap between two starts in their mean
_FIRST_RETRY = 1.0  # seconds until a place in the queue is free, while no turn has left it yet
_LEAST_RETRY, _MOST_RETRY = 0.1, 60.0  # seconds


class Scheduler:
    """Chooses each step's work, and who may wait. For the engine thread, but for what says otherwise.

    Args:
        step_tokens: the most tokens of a step; decode tokens alone may exceed it.
        max_running: the most turns in flight.
        queue_limit: the most turns that wait.
        decode_slowdown: the most times longer than its decode tokens alone that a step may take; from 1 on.
        weights: shares of tenants; 1 where not named.
        patience: seconds for which a turn without room lets those go first whose sessions have some.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        step_tokens: int,
        max_running: int,
        queue_limit: int,
        decode_slowdown: float,
        weights: Mapping[str, float] | None = None,
        patience: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.queue_limit = queue_limit
        self._costs = Costs()
        self.waiting: list[Turn] = []
        self.running: list[Turn] = []
        self._step_tokens = step_tokens
        self._max_running = max_running
        self._decode_slowdown = decode_slowdown
        self._weights = dict(weights or {})
        self._patience = patience
        self._clock = clock
        self._served: dict[str, float] = {}  # the tenants' clocks
        self._floor = 0.0  # where the clock of a tenant that was away starts
        self._here: set[str] = set()  # the tenants that had something to do in the step before
        self._prefilled: set[Turn] = set()  # in the step before
        self._stalled: set[Turn] = set()  # had no memory in the step before
        self._blocked: Turn | None = None  # had no room when it was its time
        self._blocked_since = 0.0
        self._started = 0.0  # when a turn left the queue last, or the first one came
        self._pace: float | None = None  # mean seconds from start to start while turns wait

    # the queue

    def turns(self) -> tuple[Turn, ...]:
        """All turns, running or waiting. For any thread; one that starts just now may be missing or be there
        twice."""
        return (*tuple(self.running), *tuple(self.waiting))

    def check_queue(self, tenant: str, arriving: Mapping[str, int]) -> None:
        """See whether one more turn of a tenant may wait. For any thread; waits for nothing.

        Args:
            tenant: whose turn it is.
            arriving: turns of each tenant that are on their way to `add`.

        Raises:
            QueueFull: the queue is, and no other tenant has more turns in it for its weight.
        """
        counts = Counter(arriving) + Counter(turn.tenant for turn in tuple(self.waiting))
        while counts.total() > self.queue_limit:  # those who arrive will have displaced them
            counts[min(self._heaviest(counts))] -= 1
        if counts.total() == self.queue_limit and tenant in self._heaviest(counts + Counter([tenant])):
            raise self._full(
                f"{self.queue_limit} turns may wait, and do; {counts[tenant]} of them are this tenant's"
            )

    def line(self) -> list[Turn]:
        """The turns that wait, as the last step would have started them."""
        return list(self._in_order(self.waiting))

    def add(self, turn: Turn) -> tuple[Turn, QueueFull] | None:
        """Queue a turn. If that is one too many, returns the one that has to end, and why."""
        if not self.waiting:
            self._started = self._clock()
        self.waiting.append(turn)
        if len(self.waiting) <= self.queue_limit:
            return None
        heaviest = self._heaviest(Counter(other.tenant for other in self.waiting))
        last = max((other for other in reversed(self.waiting) if other.tenant in heaviest), key=self._rank)
        return last, self._full("the queue is full, and this turn made way for another tenant's")

    def remove(self, turn: Turn) -> None:
        """Forget a turn that ended."""
        (self.running if turn in self.running else self.waiting).remove(turn)
        self._prefilled.discard(turn)
        self._stalled.discard(turn)
        if not self.running and not self.waiting:
            self._served, self._floor, self._here = {}, 0.0, set()

    def check_deadline(self, turn: Turn) -> None:
        """See whether the first token of a turn that arrives can come in time. For any thread; an estimate.

        It is of what has to be computed until then: the turn's prompt, and what fairness gives meanwhile to
        those that go first. What else may hold it up (decoding, memory, later arrivals) is left out.

        Raises:
            DeadlineExceeded: it cannot, even in half of the estimated time.
        """
        self._check_deadline(turn, self._tokens_until(turn))

    def check_waiting(self, turn: Turn) -> None:
        """See whether a queued turn could still have its first token in time if it started now.

        Raises:
            DeadlineExceeded: as in `check_deadline`.
        """
        self._check_deadline(turn, turn.remaining)

    # steps

    def schedule(self) -> StepPlan:
        """The next step; empty if nothing can run now."""
        ready = [turn for turn in self.running if not turn.paused and turn.load()]
        self._set_clocks({turn.tenant for turn in (*ready, *self.waiting)})
        plan = StepPlan()
        for turn in ready:
            if turn.decoding:
                self._give(plan, turn, 1)
        self._prefill(plan, [turn for turn in ready if not turn.decoding])
        return plan

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """Learn how long a step took."""
        self._costs.observe(plan.work, seconds)

    def _prefill(self, plan: StepPlan, started: Collection[Turn]) -> None:
        """Fill the room beside the decode tokens."""
        waiting = list(self.waiting) if self._may_start else []
        unstarted = set(waiting)
        prefilled: set[Turn] = set()
        stalled: set[Turn] = set()
        room = max(self._step_tokens - plan.decode_tokens, min(self._step_tokens, _LEAST_CHUNK))
        longest = self._decode_slowdown * self._costs.seconds(plan.work) if plan.chunks else math.inf
        began = self._clock()  # what moves in memory for those who start takes its time, too
        for turn in self._in_order([*started, *waiting]):
            spent = self._costs.seconds(plan.work) + self._clock() - began
            most = min(room, self._costs.tokens(longest - spent, turn.context))
            if most < min(_LEAST_CHUNK, turn.remaining):
                if prefilled:
                    break
                most = min(room, _LEAST_CHUNK)
            if turn in unstarted and not (self._start(plan, turn) and turn.load()):
                continue
            count = self._give(plan, turn, int(most))
            (prefilled if count else stalled).add(turn)
            room -= count
        self._prefilled, self._stalled = prefilled, stalled

    def _in_order(self, turns: Collection[Turn]) -> Iterator[Turn]:
        """The turns as they come; who comes next depends on what was given to those before."""
        ranks = {turn: (turn in self._prefilled, *self._rank(turn)) for turn in turns}
        lines: dict[str, deque[Turn]] = {}
        for turn in sorted(turns, key=lambda turn: ranks[turn]):
            lines.setdefault(turn.tenant, deque()).append(turn)

        def place(tenant: str) -> tuple[float, tuple[bool, float, float], str]:
            return self._served[tenant], ranks[lines[tenant][0]], tenant

        heap = [place(tenant) for tenant in lines]
        heapq.heapify(heap)
        while heap:
            tenant = heap[0][-1]
            yield lines[tenant].popleft()
            if lines[tenant]:
                heapq.heapreplace(heap, place(tenant))
            else:
                heapq.heappop(heap)

    @property
    def _may_start(self) -> bool:
        """Whether a turn may: those that have started and wait for a slot go before those that have not."""
        return len(self.running) < self._max_running and not any(
            turn.starved for turn in self.running if not turn.paused
        )

    def _start(self, plan: StepPlan, turn: Turn) -> bool:
        """Start a waiting turn; False if it cannot start in this step.

        Where one waits for room, no other starts; but if nothing runs, it waits for a while for those behind
        it that have room.
        """
        if turn.stored and sum(other.started is None for other in self.running) >= _MOST_LOADING:
            return False
        if not self._may_start or (plan.blocked is not None and not self._may_overtake(turn, plan.blocked)):
            return False
        if not turn.open():
            plan.blocked = turn
            if self._blocked is not turn:
                self._blocked, self._blocked_since = turn, self._clock()
            return False
        self.waiting.remove(turn)
        self.running.append(turn)
        now = self._clock()
        gap, self._started = now - self._started, now
        self._pace = gap if self._pace is None else self._pace + _PACE_GAIN * (gap - self._pace)
        return True

    def _may_overtake(self, turn: Turn, blocked: Turn) -> bool:
        return not self.running and turn.resident and self._clock() - self._blocked_since < self._patience

    def _give(self, plan: StepPlan, turn: Turn, most: int) -> int:
        """Add the turn's next chunk to the plan. Returns its tokens; 0 if it has to wait for memory."""
        if not turn.begin_segment():
            return 0
        count = min(most, turn.segment_end - turn.computed)
        plan.chunks.append(ScheduledChunk(turn, count))
        plan.work += Work(rows=1) if turn.decoding else Work.of_chunk(count, turn.context)
        self._served[turn.tenant] += count / self._weight(turn.tenant)
        return count

    # who goes before whom

    def _weight(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)

    def _rank(self, turn: Turn) -> tuple[float, float]:
        """The place within a tenant, first to last."""
        waited = self._clock() - turn.arrived
        level = turn.priority + waited / _LEVEL_SECONDS - turn.remaining / _LEVEL_TOKENS
        return -level, turn.arrived

    def _heaviest(self, counts: Mapping[str, int]) -> set[str]:
        """The tenants with the most turns for their weights."""
        loads = {tenant: count / self._weight(tenant) for tenant, count in counts.items()}
        most = max(loads.values())
        return {tenant for tenant, load in loads.items() if load == most}

    def _set_clocks(self, here: set[str]) -> None:
        """Have tenants that were away start level with those that stayed, and forget those behind them."""
        stayed = here & self._here
        if stayed:
            self._floor = max(self._floor, min(self._served[tenant] for tenant in stayed))
        for tenant in here - self._here:
            self._served[tenant] = max(self._served.get(tenant, 0.0), self._floor)
        self._served = {
            tenant: clock for tenant, clock in self._served.items() if tenant in here or clock > self._floor
        }
        self._here = here

    # estimates

    def _tokens_until(self, turn: Turn) -> float:
        """How many tokens must be computed, at the least, until a turn that arrives has its first."""
        prompt, rank = turn.remaining, self._rank(turn)
        mine, others, decoding = float(prompt), Counter[str](), set()
        for other in self.turns():
            if other.decoding:
                decoding.add(other.tenant)
            elif other in self._stalled:
                pass  # its turn may not come before
            elif other.tenant != turn.tenant:
                others[other.tenant] += other.remaining
            elif other not in self._prefilled and self._rank(other) < rank:
                mine += min(other.remaining, prompt)
        clock, weight = self._served.get(turn.tenant, self._floor), self._weight(turn.tenant)
        beside = 0.0
        for tenant, tokens in others.items():
            if tenant not in decoding:  # else that may be its share
                ahead = max(self._served.get(tenant, self._floor) - clock, 0.0)
                beside += min(tokens, max(mine / weight - ahead, 0.0) * self._weight(tenant))
        return mine + min(beside, mine)  # no more of the others: they may have to wait for memory

    def _check_deadline(self, turn: Turn, tokens: float) -> None:
        deadline = turn.request.deadline
        if deadline is None or not self._costs.known:
            return
        left = deadline - self._clock()
        needed = tokens / self._step_tokens * self._costs.seconds(Work.of_chunk(self._step_tokens, 0))
        if _OPTIMISM * needed > left:
            raise DeadlineExceeded(
                f"the first token would take about {needed:.1f} s, and the deadline leaves {left:.1f} s: "
                "send less, or allow more time",
                needed=f"{needed:.3f}",
                left=f"{left:.3f}",
            )

    def _full(self, why: str) -> QueueFull:
        """The refusal of a turn: there should be a place when the next turn starts."""
        pace = _FIRST_RETRY if self._pace is None else self._pace
        since = self._clock() - self._started  # no shorter than that, by all that is known
        return QueueFull(why, min(max(pace, since, _LEAST_RETRY), _MOST_RETRY), limit=self.queue_limit)
