"""What runs next. No torch here: turns are counters, and their memory says yes or not yet.

Every step: admit waiting turns, then fill the step's token budget, decode tokens first, prefill chunks with
the rest. Tenants share by weighted fair queueing (start-time fair queueing, Goyal et al., SIGCOMM 1996): a
tenant's clock advances by the tokens that it computes, divided by its weight, and the tenant whose clock is
behind goes first. Within a tenant higher priority goes first; waiting raises it, so nobody starves, and a
long prompt lowers it. Nobody takes more than half of the room that others wait for.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from apiary_server.engine.step import ScheduledChunk, StepPlan

if TYPE_CHECKING:
    from apiary_server.engine.turn import Turn

_LEVEL_SECONDS = 1.0  # waiting that is worth a level of priority
_LEVEL_TOKENS = 512  # tokens of prompt that cost one


class Scheduler:
    """Chooses each step's work.

    Args:
        step_tokens: the most tokens of a step; decode tokens alone may exceed it.
        max_running: the most turns in flight.
        weights: shares of tenants; 1 where not named.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        step_tokens: int,
        max_running: int,
        weights: Mapping[str, float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._step_tokens = step_tokens
        self._max_running = max_running
        self._weights = dict(weights or {})
        self._clock = clock
        self._served: dict[str, float] = defaultdict(float)
        self.waiting: list[Turn] = []
        self.running: list[Turn] = []

    def add(self, turn: Turn) -> None:
        """Queue a turn. A tenant that was away starts level with those who are here."""
        here = {other.tenant for other in (*self.waiting, *self.running)}
        if turn.tenant not in here:
            floor = min((self._served[tenant] for tenant in here), default=0.0)
            self._served[turn.tenant] = max(self._served[turn.tenant], floor)
        self.waiting.append(turn)

    def remove(self, turn: Turn) -> None:
        """Forget a turn that ended."""
        if turn in self.running:
            self.running.remove(turn)
        else:
            self.waiting.remove(turn)
        if not self.running and not self.waiting:
            self._served.clear()

    def schedule(self) -> StepPlan:
        """The next step; empty if nothing can run now."""
        plan = StepPlan()
        ready = [turn for turn in self.running if not turn.paused]
        for turn in ready:
            if turn.decoding:
                self._put(plan, turn, 1)
        plan.decode_tokens = len(plan.chunks)
        room = self._step_tokens - plan.decode_tokens
        admitting, unstarted = True, {id(turn) for turn in self.waiting}
        candidates = sorted((*(turn for turn in ready if not turn.decoding), *self.waiting), key=self._order)
        for place, turn in enumerate(candidates, 1):
            if room <= 0:
                break
            if id(turn) in unstarted:
                admitting = admitting and self._admit(plan, turn)
                if not admitting:
                    continue
            # half the room at most, while others come behind: a book leaves a place for a chat's next turn
            room -= self._put(plan, turn, room if place == len(candidates) else -(-room // 2))
        plan.prefill_tokens = sum(chunk.count for chunk in plan.chunks) - plan.decode_tokens
        return plan

    def _admit(self, plan: StepPlan, turn: Turn) -> bool:
        """Start a waiting turn; False if no more can start in this step."""
        # turns that have started and wait for a slot go before those that have not
        if len(self.running) >= self._max_running or any(
            other.starved for other in self.running if not other.paused
        ):
            return False
        if not turn.open():
            plan.blocked = turn
            return False
        self.waiting.remove(turn)
        self.running.append(turn)
        return True

    def _put(self, plan: StepPlan, turn: Turn, most: int) -> int:
        """Add the turn's next chunk to the plan. Returns its tokens; 0 if it has to wait for memory."""
        if not turn.begin_segment():
            return 0
        count = min(most, turn.segment_end - turn.computed)
        plan.chunks.append(ScheduledChunk(turn, count))
        self._served[turn.tenant] += count / self._weights.get(turn.tenant, 1.0)
        return count

    def _order(self, turn: Turn) -> tuple[float, float, float]:
        waited = self._clock() - turn.arrived
        level = turn.priority + waited / _LEVEL_SECONDS - turn.remaining / _LEVEL_TOKENS
        return (self._served[turn.tenant], -level, turn.arrived)
