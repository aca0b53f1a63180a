"""What is sent when: a workload's turns, drawn from its seed before the first of them is sent."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from apiary_bench.serving.workload import Arrival, Workload


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn to be sent.

    Attributes:
        session, number: which, from 0.
        token_ids: the input.
        output: tokens to ask for.
        at: seconds after the beginning when it arrives; None in a closed loop.
        pause: seconds of thought before it, in a closed loop.
        cancel_after: output tokens after which it is cancelled; None: never.
    """

    session: int
    number: int
    token_ids: Sequence[int]
    output: int
    at: float | None = None
    pause: float = 0.0
    cancel_after: int | None = None


def measured(workload: Workload, vocabulary: Sequence[int]) -> list[list[Turn]]:
    """The measured turns of each session, in order."""
    times = arrivals(workload)
    cancels = cancellations(workload)
    pauses = _generator(workload, "pauses")
    turns: list[list[Turn]] = [[] for _ in range(workload.sessions)]
    for place in range(workload.measured):
        number, session = divmod(place, workload.sessions)
        think = number > 0 and workload.think > 0
        turns[session].append(
            Turn(
                session,
                number,
                _tokens(workload, vocabulary, f"turn {number} of {session}", workload.input),
                workload.output,
                at=None if times is None else times[place],
                pause=pauses.expovariate(1 / workload.think) if think else 0.0,
                cancel_after=cancels.get(place),
            )
        )
    return turns


def history(workload: Workload, vocabulary: Sequence[int], longest: int, session: int) -> list[Turn]:
    """The turns that give a session its history: one, or several where a turn takes at most `longest` tokens
    and the history has more. Each answers one token, which is not counted."""
    tokens = _tokens(workload, vocabulary, f"history of {session}", workload.history)
    parts = [tokens[first : first + longest] for first in range(0, len(tokens), longest)]
    return [Turn(session, number, part, output=1) for number, part in enumerate(parts)]


def warmup(workload: Workload, vocabulary: Sequence[int], session: int) -> list[Turn]:
    """The turns of a session before the measured ones."""
    return [
        Turn(
            session,
            number,
            _tokens(workload, vocabulary, f"warm-up {number} of {session}", workload.input),
            workload.output,
        )
        for number in range(workload.warmup)
    ]


def arrivals(workload: Workload) -> list[float] | None:
    """When each of the measured turns arrives, in seconds after the first; None in a closed loop."""
    count, rate = workload.measured, workload.rate
    if rate is None:
        return None
    match workload.arrival:
        case Arrival.CONSTANT:
            return [place / rate for place in range(count)]
        case Arrival.BURST:
            return [place // workload.sessions * workload.sessions / rate for place in range(count)]
        case _:
            gaps = _generator(workload, "arrivals")
            return list(accumulate((gaps.expovariate(rate) for _ in range(count - 1)), initial=0.0))


def cancellations(workload: Workload) -> dict[int, int]:
    """By its place in the order of arrival, after how many output tokens a turn is cancelled."""
    draw = _generator(workload, "cancellations")
    chosen = draw.sample(range(workload.measured), workload.cancels)
    return {place: draw.randint(1, workload.output - 1) for place in sorted(chosen)}


def _tokens(workload: Workload, vocabulary: Sequence[int], what: str, count: int) -> Sequence[int]:
    """Of its own generator, so that a session's tokens do not depend on how many others there are."""
    return _generator(workload, what).choices(vocabulary, k=count)


def _generator(workload: Workload, what: str) -> random.Random:
    return random.Random(f"{workload.seed} {what}")  # noqa: S311 - repeatable, not secret
