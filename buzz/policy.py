"""What a cache policy is: the rule that says which entries survive."""

from __future__ import annotations

import types
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

from torch import Tensor

Positions = Literal["in_cache", "original"]
MAX_BOUND = 2**20


class PolicyError(ValueError):
    """A policy's settings, or its specification, make no sense; the message says which and why."""


@dataclass(frozen=True)
class Compaction:
    """What one application of a policy's rule decided: pure data.

    Attributes:
        index: int64 `[..., kv_heads, m]`, or `[m]` where all heads keep the same: which of the `n`
            entries survive, strictly ascending.
        score: `[..., kv_heads, m]`, the survivors' scores with the rule's restarts applied; None where
            the policy does not use scores.
        sampled: how many middle entries are now already sampled.
    """

    index: Tensor
    score: Tensor | None
    sampled: int


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """Which entries of a bounded cache survive. Immutable configuration; all state lives in the cache.

    When to compact depends on token counts alone, and so does how many entries survive: all layers and
    heads of a session stay equally long, and one `compact` serves them all at once.

    Attributes:
        positions: `in_cache`: rotary positions are in-cache indices, so a session never runs past the
            model's trained length. `original`: a survivor keeps its own position until the session is
            as long as the trained length, then changes over once.
        name: the policy's name in specifications such as `buzz(window=300)`.
        scored: whether the rule reads scores (the attention mass that each key received).

    Raises:
        PolicyError: a value has the wrong type or is out of range.
    """

    positions: Positions = "in_cache"

    name: ClassVar[str]
    scored: ClassVar[bool]

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            value = getattr(self, field.name)
            if not _conforms(value, hints[field.name]):
                raise PolicyError(
                    f"{self.name}: {field.name} must be {_words(hints[field.name])}, not {value!r}"
                )
            if type(value) is int and not 0 <= value <= MAX_BOUND:
                raise PolicyError(f"{self.name}: {field.name}={value} is not between 0 and {MAX_BOUND}")

    @property
    @abstractmethod
    def bound(self) -> int:
        """The most entries that a session's layer holds at rest, after compaction."""

    @property
    def evicts(self) -> bool:
        """Whether it makes room past its bound; if not, its user must refuse what does not fit."""
        return self.due(self.bound + 1, 0)

    @property
    def accumulates(self) -> bool:
        """Whether scores accumulate over segments; if not, they restart at 0 when a segment begins."""
        return True

    @property
    def log_n(self) -> int | None:
        """Where set, attention logits are multiplied by `max(1, log(n) / log(log_n))`, n keys in view."""
        return None

    @abstractmethod
    def due(self, n: int, sampled: int) -> bool:
        """Whether a cache of `n` entries, `sampled` of them sampled already, must be compacted."""

    @abstractmethod
    def compact(self, n: int, sampled: int, score: Tensor | None) -> Compaction:
        """Apply the rule once; the caller repeats while `due`.

        Args:
            n: entries in each layer and head.
            sampled: how many middle entries an earlier compaction sampled.
            score: floating `[..., kv_heads, n]`; not changed. Required if the policy is `scored`.
        """

    def resolve(self, max_positions: int) -> Self:
        """This policy for a model that was trained for `max_positions` positions.

        Raises:
            PolicyError: a full cache would leave no position for the next token.
        """
        if self.bound >= max_positions:
            raise PolicyError(
                f"{self} holds up to {self.bound} entries, and the model has {max_positions} positions: "
                f"the bound must be less than that"
            )
        return self

    def __str__(self) -> str:
        """The canonical specification: sizes always, options where they differ from the default."""
        own: list[str] = []
        inherited: list[str] = []
        for field in fields(self):
            value = getattr(self, field.name)
            if type(field.default) is int or value != field.default:
                text = str(value).lower() if value is None or isinstance(value, bool) else str(value)
                part = inherited if field.name in Policy.__dataclass_fields__ else own
                part.append(f"{field.name}={text}")
        settings = ",".join(own + inherited)
        return f"{self.name}({settings})" if settings else self.name

    def _check_bound(self) -> None:
        if not 1 <= self.bound <= MAX_BOUND:
            raise PolicyError(
                f"{self.name}: a bound of {self.bound} entries is not between 1 and {MAX_BOUND}"
            )


def _conforms(value: object, hint: object) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return any(_conforms(value, arm) for arm in get_args(hint))
    return type(value) is hint  # a bool is no int here


def _words(hint: object) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_words(arm) for arm in get_args(hint))
    return {int: "an integer", bool: "true or false", type(None): "none"}.get(hint, str(hint))  # type: ignore[call-overload, no-any-return]
