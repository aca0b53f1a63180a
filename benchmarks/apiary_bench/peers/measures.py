"""What the records of one point come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from statistics import fmean, median
from typing import Any

from apiary_bench.peers.driver import failure
from apiary_bench.peers.workload import Load, Rate
from apiary_bench.serving.record import Outcome, Record

_TOGETHER = 0.5  # of each answer, at least, must come while all sessions decode


@dataclass(frozen=True, slots=True, kw_only=True)
class Measures:
    """A point in numbers. Times in seconds; what the load does not show is None.

    Attributes:
        rate: tokens per second, of the kind that the workload is about.
        step: while all sessions decode, from one token of a session to its next, the mean; where every step
            brings each session one token, this is the time of a step.
        ttft_mean, ttft_max: of the measured turns, the time to first token.
        turn_mean, turn_max: of the same, the time to the last token.
        memory_bytes: resident, after the last turn, the sessions still held.
    """

    rate: float
    step: float | None
    ttft_mean: float
    ttft_max: float
    turn_mean: float
    turn_max: float
    memory_bytes: int | None


class Void(Exception):
    """A point says nothing, for this reason."""


def measure(records: Sequence[Record], load: Load, rate: Rate, memory_bytes: int | None) -> Measures:
    """Sum up the measured turns of a load.

    Raises:
        Void: a turn failed or was cut short, so that the others had it easier; or a rate of decoding was
            asked for, and the sessions hardly decoded together.
    """
    broken = [record for record in records if record.outcome is not Outcome.COMPLETED]
    if broken:
        of = f"session {broken[0].session}, turn {broken[0].turn}"
        raise Void(f"{len(broken)} of {len(records)} turns failed; {of}: {failure(broken[0])}")
    firsts = [record.arrivals[0] for record in records]
    lasts = [record.arrivals[-1] for record in records]
    together = _together(records) if load.turns == 1 and load.parallel == load.sessions else None
    match rate:
        case Rate.DECODE:
            if together is None or together[1] < _TOGETHER:
                raise Void("its sessions hardly decoded at the same time")
            found = together[0]
        case Rate.OUTPUT:
            span = max(record.sent + record.ended for record in records) - min(
                record.sent for record in records
            )
            found = sum(record.tokens for record in records) / span
        case Rate.PREFILL:
            found = median(record.input / record.arrivals[0] for record in records)
    return Measures(
        rate=found,
        step=None if together is None else load.sessions / together[0],
        ttft_mean=fmean(firsts),
        ttft_max=max(firsts),
        turn_mean=fmean(lasts),
        turn_max=max(lasts),
        memory_bytes=memory_bytes,
    )


def medians(repeats: Sequence[Measures]) -> Measures:
    """Of each number by itself, over the repeats, at least one. What any of them lacks is None."""
    found: dict[str, Any] = {}
    for field in fields(Measures):
        values = [getattr(each, field.name) for each in repeats]
        found[field.name] = None if None in values else median(values)
    return Measures(**found)


def _together(records: Sequence[Record]) -> tuple[float, float] | None:
    """While all sessions decode, from the last session's first token to the first one's last: the sum over
    the sessions of tokens per second, each from its first to its last arrival in that time; and the least
    share of its answer that any of them got in it. None if a session has no two arrivals there.

    Each session counts from an arrival to an arrival, so it does not matter in which order a step's tokens
    are sent.
    """
    begin = max(record.sent + record.arrivals[0] for record in records)
    end = min(record.sent + record.arrivals[-1] for record in records)
    rate, least = 0.0, 1.0
    for record in records:
        arrivals = zip(record.arrivals, record.arrival_tokens, strict=True)
        inside = [(at, count) for at, count in arrivals if begin <= record.sent + at <= end]
        if len(inside) < 2:
            return None
        tokens = sum(count for _, count in inside[1:])
        rate += tokens / (inside[-1][0] - inside[0][0])
        least = min(least, tokens / record.asked)
    return rate, least
