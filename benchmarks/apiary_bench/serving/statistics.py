"""What the records of a run come to, in the field's definitions.

Latencies are of completed turns. A run is void if a turn failed or was cut short: its numbers then say
nothing, because turns that do less leave more to the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, quantiles

from apiary_bench.serving.record import Outcome, Record
from apiary_bench.serving.workload import Objectives


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of seconds. Percentiles are interpolated linearly between the nearest two values, as numpy does."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Distribution | None:
        """That of the values that are not None; None if there are none."""
        found = [value for value in values if value is not None]
        if not found:
            return None
        cuts = quantiles(found, n=100, method="inclusive") if len(found) > 1 else found * 99
        return cls(len(found), fmean(found), cuts[49], cuts[89], cuts[98], max(found))


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A run in numbers. Times in seconds.

    Attributes:
        void: whether a turn failed or was cut short.
        turns: how many there were of each outcome.
        reasons: how many failed with each reason.
        duration: the measured interval: from the first request to the end of the last turn.
        input_tokens: sent in completed turns.
        output_tokens: that came, in cancelled turns, too.
        cached_tokens: tokens not re-prefilled: history that completed turns did not compute again, the sum of
            `usage.cached_tokens`.
        tokens_per_message: output tokens by messages that brought any; where it is above 1, inter-token
            latencies are of several tokens each.
        request_throughput: completed turns per second.
        output_throughput: output tokens per second.
        total_throughput: input and output tokens per second.
        good: completed turns that kept all objectives; None without objectives.
        goodput: the same per second.
        ttft, tpot, itl, e2el: of completed turns; of `itl` every gap counts once.
        delay: how much later than scheduled turns were sent, failed and cancelled ones too; None in a closed
            loop.
    """

    void: bool
    turns: dict[Outcome, int]
    reasons: dict[str, int]
    duration: float
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    tokens_per_message: float | None
    request_throughput: float
    output_throughput: float
    total_throughput: float
    good: int | None
    goodput: float | None
    ttft: Distribution | None
    tpot: Distribution | None
    itl: Distribution | None
    e2el: Distribution | None
    delay: Distribution | None


def summarise(records: Sequence[Record], objectives: Objectives) -> Summary:
    """Sum up the records, at least one, of all measured turns."""
    turns = Counter(record.outcome for record in records)
    completed = [record for record in records if record.outcome is Outcome.COMPLETED]
    delivered = [record for record in records if record.outcome in (Outcome.COMPLETED, Outcome.CANCELLED)]
    length = duration(records)
    input_tokens = sum(record.input for record in completed)
    output_tokens = sum(record.tokens for record in delivered)
    messages = sum(len(record.arrivals) for record in delivered)
    good = sum(_good(record, objectives) for record in completed) if objectives.any else None
    return Summary(
        void=bool(turns[Outcome.FAILED] or turns[Outcome.CUT_SHORT]),
        turns={outcome: turns[outcome] for outcome in Outcome},
        reasons=dict(Counter(record.reason for record in records if record.reason is not None).most_common()),
        duration=length,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cached_tokens=sum(record.usage.cached_tokens for record in completed if record.usage is not None),
        tokens_per_message=output_tokens / messages if messages else None,
        request_throughput=len(completed) / length,
        output_throughput=output_tokens / length,
        total_throughput=(input_tokens + output_tokens) / length,
        good=good,
        goodput=None if good is None else good / length,
        ttft=Distribution.of(record.ttft for record in completed),
        tpot=Distribution.of(record.tpot for record in completed),
        itl=Distribution.of(gap for record in completed for gap in record.itl),
        e2el=Distribution.of(record.e2el for record in completed),
        delay=Distribution.of(record.delay for record in records),
    )


def duration(records: Iterable[Record]) -> float:
    """Seconds from the first request to the end of the last turn."""
    spans = [(record.sent, record.sent + record.ended) for record in records]
    return max(end for _, end in spans) - min(begin for begin, _ in spans)


def _good(record: Record, objectives: Objectives) -> bool:
    """An answer of one token has no TPOT to exceed."""
    return all(
        limit is None or value is None or value <= limit
        for value, limit in ((record.ttft, objectives.ttft), (record.tpot, objectives.tpot))
    )
