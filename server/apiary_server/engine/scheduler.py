"""What runs next. No torch here: turns are counters, and their memory says yes or not yet.

Every step: admit waiting turns, then fill the step's token budget, decode tokens first, prefill chunks with
the rest. Tenants share by weighted fair queueing (start-time fair queueing, Goyal et al., SIGCOMM 1996): a
tenant's clock advances by the tokens that it computes, divided by its weight, and the tenant whose clock is
behind goes first. Within a tenant higher priority goes first, and waiting raises it, so nobody starves.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from apiary_server.engine.step import ScheduledChunk, StepPlan

if TYPE_CHECKING:
    from apiary_server.engine.turn import Turn

_AGING = 1.0  # levels of priority that a second of waiting is worth


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
        decoding = [turn for turn in ready if turn.decoding]
        starved = sum(not self._put(plan, turn, 1) for turn in decoding) > 0
        plan.decode_tokens = len(plan.chunks)
        room = self._step_tokens - plan.decode_tokens
        for turn in sorted((turn for turn in ready if not turn.decoding), key=self._order):
            if room <= 0:
                break
            if self._put(plan, turn, room):
                room -= plan.chunks[-1].count
            else:
                starved = True
        # a running turn that waits for memory goes before one that has not started
        while room > 0 and not starved and self.waiting and len(self.running) < self._max_running:
            turn = min(self.waiting, key=self._order)
            if not turn.open():
                break
            self.waiting.remove(turn)
            self.running.append(turn)
            if not self._put(plan, turn, room):
                break
            room -= plan.chunks[-1].count
        plan.prefill_tokens = sum(chunk.count for chunk in plan.chunks) - plan.decode_tokens
        return plan

    def _put(self, plan: StepPlan, turn: Turn, most: int) -> bool:
        """Add the turn's next chunk to the plan; False if it has to wait for memory."""
        if not turn.begin_segment():
            return False
        count = min(most, turn.segment_end - turn.computed)
        plan.chunks.append(ScheduledChunk(turn, count))
        self._served[turn.tenant] += count / self._weights.get(turn.tenant, 1.0)
        return True

    def _order(self, turn: Turn) -> tuple[float, float, float]:
        waited = self._clock() - turn.arrived
        return (self._served[turn.tenant], -(turn.priority + waited * _AGING), turn.arrived)
