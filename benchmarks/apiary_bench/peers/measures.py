"""What the records of one point come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from statistics import fmean, median
from typing import Any

from apiary_bench.peers.driver import failure
from apiary_bench.peers.workload import Load, Rate
from apiary_bench.serving.record import Outcome, Record
from apiary_bench.serving.statistics import duration

_TOGETHER = 0.5  # of all answers, at least, must come while all sessions decode


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
    decoding = load.turns == 1 and load.output > 1 and load.parallel == load.sessions
    together = _together(records) if decoding else None
    match rate:
        case Rate.DECODE:
            if together is None or together[1] < _TOGETHER:
                raise Void("its sessions hardly decoded at the same time")
            found = together[0]
        case Rate.OUTPUT:
            found = sum(record.tokens for record in records) / duration(records)
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
    """While all sessions decode, from the last one's first token to the first one's last: tokens per second
    of all together, and the share of all that were asked for that came in it. None if none came.

    A step's tokens are sent one after the other, in any order: what is less than half a step after the
    beginning belongs to the step before it, and what is less than half a step after the end to the last one.
    """
    gaps = [gap for record in records for gap in record.itl]
    if not gaps:
        return None
    half = median(gaps) / 2
    begin = max(record.sent + record.arrivals[0] for record in records)
    end = min(record.sent + record.arrivals[-1] for record in records)
    inside = [
        (record.sent + at, count)
        for record in records
        for at, count in zip(record.arrivals, record.arrival_tokens, strict=True)
        if begin + half < record.sent + at < end + half
    ]
    if not inside:
        return None
    tokens = sum(count for _, count in inside)
    rate = tokens / (max(at for at, _ in inside) - begin)
    return rate, tokens / sum(record.asked for record in records)
