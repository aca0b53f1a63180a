"""What all engines are given: named workloads, each a few points of growing size."""

from __future__ import annotations

import enum
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from apiary_bench.errors import SettingsError

GIB = 2**30
_ORDINARY = 100  # token ids below are often special
_ANSWER = 1  # tokens that end a history


class Rate(enum.StrEnum):
    """Which tokens per second a workload is about; all are of one point's measured turns."""

    DECODE = "decode"
    """Output tokens while all sessions decode, from the last one's first token to the first one's last."""
    OUTPUT = "output"
    """Output tokens, from the first request to the end of the last turn."""
    PREFILL = "prefill"
    """Input tokens of a turn by its time to first token, the median of the turns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Conversations. Each is given its history, which is not measured; when all have theirs, they take their
    measured turns. All tokens are drawn; answers are greedy, and end at exactly `output` tokens.

    Attributes:
        sessions: conversations.
        history: tokens that each is given before; 0: none. It is answered with one token.
        turns: measured turns of each, every one sent when the last has ended.
        input, output: tokens of each turn.
        at_once: conversations that take their turns at the same time; None: all.
    """

    sessions: int
    history: int = 0
    turns: int = 1
    input: int
    output: int
    at_once: int | None = None

    @property
    def positions(self) -> int:
        """Tokens of a conversation at its end."""
        before = self.history + _ANSWER if self.history else 0
        return before + self.turns * (self.input + self.output)

    @property
    def parallel(self) -> int:
        """Conversations that take their turns at the same time."""
        return min(self.sessions, self.at_once or self.sessions)


@dataclass(frozen=True, slots=True)
class Point:
    """One load of a workload. `label` names it in tables, `size` places it in pictures."""

    label: str
    size: int
    load: Load


@dataclass(frozen=True, slots=True)
class Workload:
    """Points that one start of an engine is measured at, in this order.

    Attributes:
        name: as on the command line.
        about: what it is, for tables.
        rate: what counts.
        budget_bytes: memory for the caches of all its sessions.
        points: in growing size: when an engine takes too long for one, it is spared the next.
        axis: what grows from point to point, where that makes a curve.
    """

    name: str
    about: str
    rate: Rate
    budget_bytes: int
    points: tuple[Point, ...]
    axis: str | None = None

    @property
    def sessions(self) -> int:
        """The most of any point."""
        return max(point.load.sessions for point in self.points)

    @property
    def turns(self) -> int:
        """Of all points, those that give a history among them."""
        loads = [point.load for point in self.points]
        return sum(load.sessions * (load.turns + (load.history > 0)) for load in loads)


def workloads(names: Iterable[str], *, quick: bool = False) -> list[Workload]:
    """Those with these names; with `quick` so small that they show nothing but that all works.

    Raises:
        SettingsError: there is no such workload.
    """
    found = {workload.name: workload for workload in (_quick() if quick else _full())}
    if unknown := sorted(set(names) - found.keys()):
        raise SettingsError(f"no workload {', '.join(unknown)}: choose among {', '.join(found)}")
    return [found[name] for name in dict.fromkeys(names)]


def names() -> list[str]:
    """Of all workloads."""
    return [workload.name for workload in _full()]


def tokens(seed: int, what: str, count: int, vocab_size: int) -> list[int]:
    """Drawn token ids; the same for the same arguments."""
    draw = random.Random(f"{seed} {what}")  # noqa: S311 - repeatable, not secret
    return draw.choices(range(_ORDINARY, vocab_size), k=count)


def _full() -> list[Workload]:
    return _named(
        decode=Load(sessions=16, history=600, input=8, output=64),
        turns=Load(sessions=16, history=3000, turns=3, input=32, output=32),
        prompts=(512, 4000),
        repeats=3,
        sessions=[2**power for power in range(8)],
        context=600,
        histories=[2**power for power in range(8, 16)],
        output=32,
    )


def _quick() -> list[Workload]:
    return _named(
        decode=Load(sessions=3, history=64, input=8, output=16),
        turns=Load(sessions=3, history=200, turns=2, input=16, output=16),
        prompts=(64, 256),
        repeats=2,
        sessions=[1, 2],
        context=64,
        histories=[128, 256],
        output=8,
    )


def _named(
    *,
    decode: Load,
    turns: Load,
    prompts: Sequence[int],
    repeats: int,
    sessions: Sequence[int],
    context: int,
    histories: Sequence[int],
    output: int,
) -> list[Workload]:
    """The workloads of these sizes. In `growth-history` a size is that of the whole conversation at its end,
    so that a model's last position is one of them."""
    alone = Load(sessions=1, input=8, output=output)
    around = alone.positions + _ANSWER
    return [
        Workload(
            "decode",
            "many sessions decode at the same time",
            Rate.DECODE,
            2 * GIB,
            (Point(f"{decode.sessions} x {decode.history}", decode.sessions, decode),),
        ),
        Workload(
            "turns",
            "the next short turns of many long conversations",
            Rate.OUTPUT,
            GIB,
            (Point(f"{turns.sessions} x {turns.history}", turns.sessions, turns),),
        ),
        Workload(
            "prefill",
            "one prompt at a time",
            Rate.PREFILL,
            GIB,
            tuple(
                Point(f"{size} tokens", size, Load(sessions=repeats, input=size, output=1, at_once=1))
                for size in prompts
            ),
        ),
        Workload(
            "growth-sessions",
            "more and more sessions decode at the same time",
            Rate.DECODE,
            8 * GIB,
            tuple(
                Point(
                    f"{count} x {context}",
                    count,
                    Load(sessions=count, history=context, input=8, output=output),
                )
                for count in sessions
            ),
            axis="sessions",
        ),
        Workload(
            "growth-history",
            "one session with a longer and longer history",
            Rate.DECODE,
            GIB,
            tuple(
                Point(f"1 x {size}", size, Load(sessions=1, history=size - around, input=8, output=output))
                for size in histories
            ),
            axis="tokens of the conversation",
        ),
    ]
