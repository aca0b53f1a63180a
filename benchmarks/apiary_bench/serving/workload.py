"""What a load consists of."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

from apiary_bench.errors import SettingsError
from apiary_client import Model


class Arrival(enum.StrEnum):
    """When turns are sent.

    In a closed loop a session sends its next turn when its last one has ended, so the load adapts to the
    worker. The others are open loops: turns arrive at their rate whatever the worker does. Arrival `i` is a
    turn of session `i % sessions`; if that session's last turn still runs, it is sent when that has ended,
    and the wait is reported as its start delay.
    """

    CLOSED = "closed"
    POISSON = "poisson"
    """Independent arrivals: exponential gaps."""
    CONSTANT = "constant"
    """Equal gaps."""
    BURST = "burst"
    """A turn of every session at once, and the same again every `sessions / rate` seconds."""


@dataclass(frozen=True, slots=True)
class Objectives:
    """Service level objectives: the most seconds that a good request may take. None sets no limit."""

    ttft: float | None = None
    tpot: float | None = None

    def __post_init__(self) -> None:
        for name in ("ttft", "tpot"):
            if (value := getattr(self, name)) is not None:
                _require(f"the objective {name.upper()} in seconds", value, above=0)

    @property
    def any(self) -> bool:
        """Whether there is one."""
        return self.ttft is not None or self.tpot is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A load. All that is random in it is a function of `seed`.

    Attributes:
        sessions: conversations, all at the same time.
        turns: measured turns of each session.
        history: tokens that each session is given before, not measured.
        input: tokens of each turn's input, drawn from the vocabulary without its end-of-turn tokens.
        output: tokens of each answer, exactly: end-of-turn tokens do not end it. Greedy.
        policy: cache policy of the sessions; None: the worker's default.
        arrival: when turns are sent; None: `POISSON` with a rate, `CLOSED` without.
        rate: turns per second of all sessions together; open loops need it, a closed loop has none.
        think: mean seconds, exponentially distributed, between the end of a turn and the next one of its
            session; in a closed loop only.
        cancel_rate: the part of the measured turns that are cancelled, after 1 to `output - 1` tokens; which,
            and after how many, is drawn.
        warmup: turns of each session before the measured ones, in a closed loop, not measured. They stay in
            the session.
        timeout: deadline of a turn in seconds; None: none. A turn that passes it has failed.
        tenants: on whose behalf; sessions take them in turn. None: the worker's default tenant.
        objectives: what a request must keep to count as goodput.

    Raises:
        SettingsError: a value is out of range, or two contradict each other.
    """

    sessions: int = 16
    turns: int = 3
    history: int = 0
    input: int = 32
    output: int = 32
    policy: str | None = None
    arrival: Arrival | None = None
    rate: float | None = None
    think: float = 0.0
    cancel_rate: float = 0.0
    warmup: int = 0
    timeout: float | None = None
    tenants: tuple[str | None, ...] = (None,)
    objectives: Objectives = Objectives()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.arrival is None:
            object.__setattr__(self, "arrival", Arrival.CLOSED if self.rate is None else Arrival.POISSON)
        for name in ("sessions", "turns", "input", "output"):
            _require(name, getattr(self, name), least=1)
        for name in ("history", "warmup", "seed", "think"):
            _require(name, getattr(self, name), least=0)
        _require("cancel rate", self.cancel_rate, least=0, most=1)
        if self.timeout is not None:
            _require("timeout", self.timeout, above=0)
        if not 1 <= len(self.tenants) <= self.sessions:
            raise SettingsError(
                f"{self.sessions} sessions are of 1 to {self.sessions} tenants, not {len(self.tenants)}"
            )
        self._check_arrival()
        if self.cancel_rate > 0 and self.output < 2:
            raise SettingsError(
                "turns of one output token end before they can be cancelled: ask for 2 or more"
            )

    def _check_arrival(self) -> None:
        if self.arrival is Arrival.CLOSED:
            if self.rate is not None:
                raise SettingsError(
                    "a closed loop has no rate, its turns follow each other: "
                    "leave the rate out, or choose poisson, constant or burst"
                )
            return
        if self.rate is None:
            raise SettingsError(f"arrival {self.arrival} needs a rate in turns per second")
        _require("rate", self.rate, above=0)
        if self.think > 0:
            raise SettingsError(
                f"arrival {self.arrival} sets when turns are sent: think time is for closed loops"
            )

    @property
    def open(self) -> bool:
        """Whether turns arrive whatever the worker does."""
        return self.arrival is not Arrival.CLOSED

    @property
    def measured(self) -> int:
        """Measured turns of all sessions."""
        return self.sessions * self.turns

    @property
    def cancels(self) -> int:
        """How many of them are to be cancelled."""
        return round(self.cancel_rate * self.measured)

    def check(self, model: Model) -> None:
        """Refuse what the served model never takes.

        Raises:
            SettingsError: the input or the output is longer than one turn may be.
        """
        _require("input", self.input, most=model.max_prompt_tokens)
        _require("output", self.output, most=model.max_tokens)


def vocabulary(model: Model) -> Sequence[int]:
    """The token ids that inputs are drawn from: all but those that end a turn, the only special tokens that a
    worker names."""
    special = set(model.eos_token_ids)
    return [token for token in range(model.vocab_size) if token not in special]


def _require(
    name: str, value: float, *, least: float = -math.inf, above: float = -math.inf, most: float = math.inf
) -> None:
    if math.isfinite(value) and least <= value <= most and value > above:
        return
    limits = [
        f"{words} {limit:.12g}"
        for words, limit in (("at least", least), ("above", above), ("at most", most))
        if math.isfinite(limit)
    ]
    raise SettingsError(f"{name} must be {' and '.join(limits)}, not {value:.12g}")
