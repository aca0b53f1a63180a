"""What a cache policy is: the rule that says which entries survive."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from buzz.quant import BITS, BLOCK
from buzz.regions import Kind, Region, in_order

Positions = Literal["in_cache", "original"]
MAX_BOUND = 2**20
MAX_STATES = 2  # that a policy may declare: workspaces serve all policies, and have room for so many


class PolicyError(ValueError):
    """A policy's settings, or its specification, make no sense; the message says which and why."""


@dataclass(frozen=True, slots=True)
class State:
    """What attention records of each entry for a policy: four bytes an entry and KV head.

    Attributes:
        name: how the policy's rule finds it in its view.
        kind: `mass`, float32: the softmax weights that the key received, summed over the queries and over
            the query heads that share it; an entry starts at 0. `vote`, int32: the index of the last token
            to whose query, in any of those heads, the key mattered (its weight was at least the mean, one
            over the keys in view); an entry starts at its own token.
        decay: `mass` only: what is there is multiplied by this before each query's weights are added, so
            that 1 is a sum and less forgets. Above 0 and at most 1.
        per: `mass` only: `session` goes on, `segment` restarts at 0 when a segment begins.

    Raises:
        PolicyError: a value has the wrong type or is out of range, or a vote has what only a mass can have.
    """

    name: str
    kind: Literal["mass", "vote"] = "mass"
    decay: float = 1.0
    per: Literal["session", "segment"] = "session"

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and self.name):
            raise PolicyError(f"a state's name must be text, not {self.name!r}")
        if self.kind not in ("mass", "vote"):
            raise PolicyError(f"state {self.name!r}: kind must be mass or vote, not {self.kind!r}")
        if self.per not in ("session", "segment"):
            raise PolicyError(f"state {self.name!r}: per must be session or segment, not {self.per!r}")
        if self.kind == "vote" and (self.decay, self.per) != (1.0, "session"):
            raise PolicyError(f"state {self.name!r}: a vote has no decay, and none per segment")
        if not (isinstance(self.decay, (int, float)) and 0 < self.decay <= 1):
            raise PolicyError(f"state {self.name!r}: decay={self.decay!r} is not above 0 and at most 1")

    @property
    def dtype(self) -> torch.dtype:
        """How it is stored; tests in float64 store masses wider."""
        return torch.float32 if self.kind == "mass" else torch.int32


@dataclass(frozen=True, slots=True)
class View:
    """A cache at a segment's end, as a policy's rule sees it: all layers and heads at once, read only.

    Attributes:
        sampled: middle entries that an earlier compaction sampled; what that means is the policy's.
        seen: tokens ever appended.
        position: int32 `[..., kv_heads, n]`, each entry's original token position.
        state: by name, `[..., kv_heads, n]`: what the policy declared in `states`.
        value_norm: `[..., kv_heads, n]`, at least float32: Euclidean norms of the values, if the policy
            `weighs_values`.
        pinned: how many entries lie before these.
    """

    sampled: int
    seen: int
    position: Tensor
    state: Mapping[str, Tensor]
    value_norm: Tensor | None = None
    pinned: int = 0

    @property
    def evicted(self) -> int:
        """How many entries of each layer and head are gone."""
        return self.seen - self.pinned - self.n

    @property
    def n(self) -> int:
        """Entries in each layer and head."""
        return self.position.shape[-1]

    def span(self, first: int, last: int, step: int = 1) -> Tensor:
        """The entries `first, first + step, ...` before `last` in every head: int64 `[..., kv_heads, m]`."""
        index = torch.arange(first, last, step, device=self.position.device)
        return index.expand(*self.position.shape[:-1], -1)


@dataclass(frozen=True, slots=True)
class Compaction:
    """What one application of a policy's rule decided: pure data.

    Attributes:
        index: int64 `[..., kv_heads, m]`, m at least 1: which of the `n` entries survive, strictly
            ascending; `View.span` makes it where all heads keep the same.
        sampled: how many middle entries are now already sampled.
        state: by name, `[..., kv_heads, m]`: the survivors' states where the rule changes them; the others
            stay as they are.
        merge: int64 `[..., kv_heads, n]`: for each entry the survivor (a place in `index`) whose key and
            value become the mean of its own and those merged into it; a survivor has its own place, and -1
            is dropped for good. None: nothing is merged.
    """

    index: Tensor
    sampled: int = 0
    state: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    merge: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """Which entries of a bounded cache survive. Immutable configuration; all state lives in the cache.

    When to compact depends on token counts alone, and so does how many entries survive: all layers and
    heads of a session stay equally long, and one `compact` serves them all at once.

    Attributes:
        positions: `in_cache`: rotary positions are in-cache indices, so a session never runs past the
            model's trained length. `original`: a survivor keeps its own position until the session is
            as long as the trained length, then changes over once.
        kivi: where set, entries are quantised to so many bits, 2 or 4, once they are no longer among the
            most recent (see `buzz.quant`).
        pinned: how many of the first tokens never leave, whatever the rule; they take their places from the
            bound, and the rule has the others, its `sizes` in proportion. `system` means what a session
            opens with before its user says anything, that is the system prompt, and pins nothing until
            `pinning` is told how long that is.
        residual: with `kivi`, how many of the most recent entries are left as they are, at least: they are
            quantised 32 at a time, so the bound must have room for that many more. A segment of several
            tokens may go down to half as many where it would not fit its memory otherwise.
        name: the policy's name in specifications such as `buzz(window=300)`.
        sizes: the settings that share the bound, beside what is fixed; `sized` scales them.

    Raises:
        PolicyError: a value has the wrong type or is out of range, or the class is not as it must be.
    """

    positions: Positions = "in_cache"
    kivi: int | None = None
    residual: int = 128
    pinned: int | Literal["system"] = 0

    name: ClassVar[str]
    sizes: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        self._check_class()
        self._check_types()
        if self.bound is not None:  # a full cache's, until it is resolved
            if type(self.bound) is not int:
                raise PolicyError(f"{self.name}: bound must be an integer, not {self.bound!r}")
            if not 1 <= self.bound <= MAX_BOUND:
                raise PolicyError(
                    f"{self.name}: a bound of {self.bound} entries is not between 1 and {MAX_BOUND}"
                )
        self.validate()
        self._check_states()
        self._check_kivi()
        self._check_pinned()

    def validate(self) -> None:  # noqa: B027  # most have nothing to refuse
        """Refuse settings that make no sense; called when a policy is made, after its types and bound were
        checked.

        Raises:
            PolicyError: they make no sense, or not together.
        """

    @property
    @abstractmethod
    def bound(self) -> int:
        """The most entries that a session's layer holds at rest, after compaction: 1 to `MAX_BOUND`."""

    @property
    def states(self) -> tuple[State, ...]:
        """What attention must record of each entry for the rule: at most `MAX_STATES`."""
        return ()

    @property
    def weighs_values(self) -> bool:
        """Whether the rule reads the norms of the values."""
        return False

    @property
    def evicts(self) -> bool:
        """Whether it makes room past its bound; if not, its user must refuse what does not fit."""
        return self.due(self.bound + 1, 0)

    @property
    def log_n(self) -> int | None:
        """Where set, attention logits are multiplied by `max(1, log(n) / log(log_n))`, n keys in view."""
        return None

    @functools.cached_property
    def pins(self) -> int:
        """How many of the first entries are pinned."""
        return 0 if self.pinned == "system" or not self.evicts else self.pinned

    @functools.cached_property
    def rule(self) -> Self:
        """This policy for the entries that are not pinned, at the bound that the pinned ones leave."""
        if not self.pins:
            return self
        alone: Self = dataclasses.replace(self, pinned=0, kivi=None, residual=Policy.residual)
        return alone.sized(self.bound - self.pins)

    @abstractmethod
    def due(self, n: int, sampled: int) -> bool:
        """Whether a cache of `n` entries, `sampled` of them sampled already, must be compacted. Here and in
        the next two no entry is pinned: `buzz.compaction` asks the `rule`, of the others."""

    @abstractmethod
    def compact(self, view: View) -> Compaction:
        """Apply the rule once; the caller repeats while `due`."""

    def regions(self, n: int, sampled: int, seen: int) -> tuple[Region, ...]:
        """Why the entries of a cache at rest are there: in order and without gaps, the same of all layers and
        heads. All are of the middle, unless a policy knows better.

        Args:
            n: how many there are.
            sampled: how many of them are sampled already.
            seen: tokens ever appended.
        """
        return in_order(n, (Kind.MIDDLE, n))

    def quantised(self, n: int, packed: int) -> int:
        """How many of `n` entries at a segment's end will lie in few bits, where the first `packed` do."""
        if self.kivi is None or n - packed < self.residual + BLOCK:
            return packed
        return n - self.residual

    def pinning(self, system: int) -> Self:
        """This policy in a session that opens with so many tokens of a system prompt.

        Raises:
            PolicyError: the bound has no room for them.
        """
        return dataclasses.replace(self, pinned=system) if self.pinned == "system" else self

    def sized(self, bound: int) -> Self:
        """This policy at another bound: its `sizes` in proportion, all else as it is. With `kivi`, a bound
        that has no room for quantised entries beside the residual makes the residual smaller.

        Raises:
            PolicyError: there is no size to scale, nothing is left for one, or they no longer fit together.
        """
        settings: dict[str, Any] = self._scaled(bound)
        if self.kivi is not None:
            settings["residual"] = min(self.residual, max(0, bound - BLOCK))
        return dataclasses.replace(self, **settings)

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
        default = {field.name: field.default for field in fields(self)}
        parts: list[str] = []
        for name in _from_most_derived(type(self)):
            value, size = getattr(self, name), type(default[name]) is int
            if value != default[name] or (size and name not in Policy.__dataclass_fields__):
                text = str(value).lower() if value is None or isinstance(value, bool) else str(value)
                parts.append(f"{name}={text}")
        return f"{self.name}({','.join(parts)})" if parts else self.name

    def _check_class(self) -> None:
        own = type(self)
        for base in own.__mro__:
            for name, value in vars(base).items():
                if isinstance(value, property) and inspect.isfunction(getattr(own, name)):
                    raise PolicyError(f"{own.__name__}: {name} is a method; put @property above it")
        known = [field.name for field in fields(self)]
        if not isinstance(self.sizes, tuple) or not set(self.sizes) <= set(known):
            raise PolicyError(
                f"{self.name}: sizes={self.sizes!r} is not a tuple of settings; those are {', '.join(known)}"
            )

    def _check_states(self) -> None:
        states = self.states
        if not isinstance(states, tuple) or not all(isinstance(state, State) for state in states):
            raise PolicyError(f'{self.name}: states must be a tuple, as (State("score"),) is, not {states!r}')
        if len(states) > MAX_STATES:
            raise PolicyError(
                f"{self.name}: {len(states)} states are declared, and there is room for {MAX_STATES}"
            )
        named = [state.name for state in states]
        if len(set(named)) < len(named):
            raise PolicyError(f"{self.name}: states must differ by name, and these are {', '.join(named)}")

    def _check_types(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            value = getattr(self, field.name)
            if not _conforms(value, hints[field.name]):
                raise PolicyError(
                    f"{self.name}: {field.name} must be {_words(hints[field.name])}, not {value!r}"
                )
            if type(value) is int and not 0 <= value <= MAX_BOUND:
                raise PolicyError(f"{self.name}: {field.name}={value} is not between 0 and {MAX_BOUND}")

    def _check_kivi(self) -> None:
        if self.kivi is None:
            if self.residual != Policy.residual:
                raise PolicyError(
                    f"{self.name}: residual={self.residual} means nothing without kivi=2 or kivi=4"
                )
            return
        if self.kivi not in BITS:
            raise PolicyError(f"{self.name}: kivi={self.kivi} is not 2 or 4 bits, or none")
        if self.bound is not None and self.bound < self.residual + BLOCK:
            smaller = f"residual={self.bound - BLOCK} or less, or " if self.bound >= BLOCK else ""
            raise PolicyError(
                f"{self.name}: kivi={self.kivi} would quantise nothing: {BLOCK} entries at a time are "
                f"quantised beside a residual of {self.residual}, and a bound of {self.bound} never holds so "
                f"many; choose {smaller}a bound of {self.residual + BLOCK} or more"
            )

    def _check_pinned(self) -> None:
        if not self.pinned or self.bound is None:
            return
        left = self.bound - self.pins
        try:
            if left < 1:
                raise PolicyError("nothing is left")
            self.rule  # noqa: B018  # it is made, and kept
        except PolicyError as error:
            raise PolicyError(
                f"{self.name}: pinned={self.pins} leaves {max(left, 0)} of a bound of {self.bound} for other "
                f"entries ({error}); pin less, or choose a larger bound"
            ) from error

    def _scaled(self, bound: int) -> dict[str, int]:
        """The settings that make the bound `bound`; policies override it whose sizes do not just add up."""
        total = sum(getattr(self, name) for name in self.sizes)
        if not total:
            raise PolicyError(f"{self} names no sizes that could be scaled to a bound of {bound}: set them")
        rest = bound - (self.bound - total)
        scaled = {name: getattr(self, name) * rest // total for name in self.sizes}
        scaled[self.sizes[-1]] += rest - sum(scaled.values())
        return scaled


def _from_most_derived(policy: type[Policy]) -> list[str]:
    """The names of all settings, a policy's own first and those of every policy last."""
    known = {field.name for field in fields(policy)}
    names = (name for base in policy.__mro__ for name in inspect.get_annotations(base) if name in known)
    return sorted(dict.fromkeys(names), key=lambda name: name in Policy.__dataclass_fields__)


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
