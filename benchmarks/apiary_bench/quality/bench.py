"""What every task runs with: the model, the policies, and the memory that each is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from apiary_bench.errors import DataError, SettingsError
from apiary_bench.quality.memory import Trace, footprint
from apiary_bench.quality.sizing import Sized, fit
from apiary_server.model.loader import LoadedModel
from buzz import Policy, PolicyError, parse


@dataclass(frozen=True, slots=True)
class Contender:
    """A policy as asked for; `label` is how the user wrote it."""

    label: str
    policy: Policy


@dataclass(frozen=True, slots=True)
class Budget:
    """How much memory a policy is given, on average.

    Attributes:
        entries: for tasks with an absolute target: entries of each head and layer.
        ratio: for the others: how many times less than the prompt's tokens.
    """

    entries: int
    ratio: float


@dataclass(frozen=True, slots=True)
class Bench:
    """A model and the policies that it is run with.

    Attributes:
        loaded: the model.
        contenders: the policies; the first is `full`, the reference of all others.
        match: policies are scaled to equal averages of this; None: they run as written.
    """

    loaded: LoadedModel
    contenders: tuple[Contender, ...]
    match: Literal["bytes", "entries"] | None = "bytes"

    @property
    def policies(self) -> list[Policy]:
        """The policies as asked for."""
        return [contender.policy for contender in self.contenders]

    def sized(self, trace: Trace, entries: float) -> list[Sized]:
        """The policies as they run over a trace, with a target of `entries` entries on average.

        Raises:
            SettingsError: one of them cannot be scaled to anything.
        """
        geometry = self.loaded.geometry
        if self.match is None:
            return [Sized(policy, footprint(policy, trace, geometry), None) for policy in self.policies]
        step = max((segment.tokens for segment in trace[1:]), default=1)
        most = self.loaded.rotary.max_positions - step
        try:
            return [fit(policy, trace, entries, geometry, most, self.match) for policy in self.policies]
        except PolicyError as error:
            raise SettingsError(str(error)) from error

    def require_positions(self, what: str, tokens: int) -> None:
        """Check that the full cache can hold a document.

        Raises:
            DataError: it is longer than the model.
        """
        if tokens > self.loaded.rotary.max_positions:
            raise DataError(
                f"{what} takes {tokens} tokens, and the model has {self.loaded.rotary.max_positions} "
                "positions: remove it, or use another model"
            )


def contenders(specs: Sequence[str], max_positions: int) -> tuple[Contender, ...]:
    """Read policies. `full` comes first, whether it was asked for or not: it is what others are measured by.

    Raises:
        SettingsError: a specification is malformed, does not fit the model, or is repeated.
    """
    found = [Contender("full", parse("full").resolve(max_positions))]
    for spec in specs:
        try:
            policy = parse(spec).resolve(max_positions)
        except PolicyError as error:
            raise SettingsError(str(error)) from error
        if not policy.evicts and policy.kivi is None:
            if spec != "full":
                raise SettingsError(f"{spec} evicts nothing: only plain `full`, the reference, may do so")
            continue
        if policy in [contender.policy for contender in found]:
            raise SettingsError(f"policy {spec} is given twice")
        found.append(Contender(spec, policy))
    return tuple(found)


def split_specs(text: str) -> list[str]:
    """Cut a comma list of policies, but not inside parentheses.

    Raises:
        SettingsError: the parentheses do not match, or a policy is empty.
    """
    specs, depth = [""], 0
    for char in text:
        depth += (char == "(") - (char == ")")
        if depth not in (0, 1):
            break
        if char == "," and depth == 0:
            specs.append("")
        else:
            specs[-1] += char
    if depth != 0:
        raise SettingsError(f"{text!r}: the parentheses do not match")
    specs = [spec.strip() for spec in specs]
    if not all(specs):
        raise SettingsError(f"{text!r} has an empty policy; write for example 'full,h2o,buzz(window=300)'")
    return specs
