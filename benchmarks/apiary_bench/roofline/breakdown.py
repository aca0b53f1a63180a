"""Where the time of an engine's steps goes, measured from outside."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from torch import nn

from apiary_bench.roofline.floor import Load
from apiary_bench.roofline.part import Part
from apiary_server.engine import loop
from apiary_server.engine.delivery import Delivery
from apiary_server.engine.loop import Loop
from apiary_server.engine.result import Observer, StepStats
from apiary_server.model.backends.cpu import linear, panels
from apiary_server.model.backends.cpu.tape import Tape
from apiary_server.model.detokenizer import Detokenizer
from apiary_server.model.operations import Operations
from apiary_server.model.runner import Piece, Runner
from apiary_server.sessions.transaction import Transaction
from buzz import attention as kernels

_WATCHED: tuple[tuple[Part, Any, str], ...] = (
    (Part.LINEAR, panels.Panels, "__call__"),
    (Part.LINEAR, linear.Packed, "__call__"),
    (Part.LINEAR, linear.Int8, "__call__"),
    (Part.LINEAR, nn.Linear, "forward"),
    (Part.EMBEDDING, nn.Embedding, "forward"),
    (Part.ATTENTION, Operations, "attend"),
    (Part.SCORES, kernels, "_add_mass"),
    (Part.SCORES, kernels, "_vote"),
    (Part.SAMPLING, loop, "sample"),
    (Part.COMPACTION, Transaction, "begin_segment"),
    (Part.COMPACTION, Transaction, "end_segment"),
    (Part.DELIVERY, Detokenizer, "add"),
    (Part.DELIVERY, Detokenizer, "finish"),
    (Part.DELIVERY, Delivery, "send"),
    (Part.DELIVERY, Delivery, "flush"),
)
_KERNELS = {"float32_linear": Part.LINEAR, "int8_linear": Part.LINEAR, "attend_decode": Part.ATTENTION}
"""Of those that a tape runs; the others are dispatch."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step: seconds of each part, which add up to its time, and what it worked on."""

    parts: dict[Part, float]
    load: Load
    stats: StepStats

    @property
    def seconds(self) -> float:
        """All of it."""
        return sum(self.parts.values())


class Breakdown(Observer):
    """Clocks the parts of every step while the context is open; to be the observer of the engine, too.

    A step is one round of the engine's loop. The functions that the parts consist of are replaced by such as
    look at the clock when they begin and end; the time of one that another calls is the inner one's. That
    takes about a microsecond a call, and there are a few hundred in a step, unless it is on a tape, which has
    a clock of its own.
    """

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._restore = ExitStack()
        self._thread: int | None = None  # the engine's, within a step
        self._running: list[Part] = []
        self._parts: dict[Part, float] = {}
        self._since = 0.0
        self._load: Load | None = None
        self._stats: StepStats | None = None

    def __enter__(self) -> Breakdown:
        for part, owner, name in _WATCHED:
            self._replace(owner, name, functools.partial(self._clocked, part))
        self._replace(Tape, "__call__", self._played)
        self._replace(Runner, "run", self._loaded)
        self._replace(Loop, "step", self._whole)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore.close()

    def step(self, stats: StepStats) -> None:
        """The engine computed a step, and will hand out what came of it."""
        self._stats = stats

    def decoding(self, sessions: int) -> list[Step]:
        """The steps in which so many sessions computed one generated token each, and nothing else."""
        return [
            step
            for step in self.steps
            if step.stats.decode_tokens == sessions and not step.stats.prefill_tokens
        ]

    def _replace(
        self, owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
    ) -> None:
        original = vars(owner)[name]
        setattr(owner, name, wrap(original))
        self._restore.callback(setattr, owner, name, original)

    def _clocked(self, part: Part, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def clocked(*args: Any, **kwargs: Any) -> Any:
            if self._thread != threading.get_ident():
                return function(*args, **kwargs)
            self._charge()
            self._running.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._charge()
                self._running.pop()

        return clocked

    def _played(self, play: Callable[[Tape, int], None]) -> Callable[[Tape, int], None]:
        clocked = self._clocked(Part.DISPATCH, play)

        def played(tape: Tape, rows: int) -> None:
            clocked(tape, rows)
            if self._thread == threading.get_ident():
                for name, seconds in tape.seconds.items():
                    part = _KERNELS.get(name, Part.DISPATCH)
                    self._parts[part] = self._parts.get(part, 0.0) + seconds
                    self._parts[Part.DISPATCH] -= seconds

        return played

    def _loaded(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """The forward pass, which knows what it works on."""
        clocked = self._clocked(Part.DISPATCH, run)

        def loaded(runner: Runner, pieces: Sequence[Piece], *args: Any) -> Any:
            if self._thread == threading.get_ident():
                self._load = Load(
                    rows=sum(len(piece.tokens) for piece in pieces),
                    entries=sum(piece.cache.n + len(piece.tokens) for piece in pieces),
                    packed=sum(piece.cache.packed for piece in pieces),
                )
            return clocked(runner, pieces, *args)

        return loaded

    def _whole(self, step: Callable[[Loop], None]) -> Callable[[Loop], None]:
        def whole(loop: Loop) -> None:
            self._thread, self._running, self._parts = threading.get_ident(), [Part.OTHER], {}
            self._load = self._stats = None
            self._since = perf_counter()
            try:
                step(loop)
            finally:
                self._charge()
                self._thread = None
            if self._load is not None and self._stats is not None:
                self.steps.append(Step(self._parts, self._load, self._stats))

        return whole

    def _charge(self) -> None:
        """What has passed since the last look at the clock was the running part's."""
        now = perf_counter()
        part = self._running[-1]
        self._parts[part] = self._parts.get(part, 0.0) + now - self._since
        self._since = now
