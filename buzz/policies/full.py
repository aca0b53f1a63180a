"""Keep everything, up to a stated bound."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Self

from buzz.policy import Compaction, Policy, PolicyError, View
from buzz.regions import Kind, Region, in_order


@dataclass(frozen=True, kw_only=True)
class Full(Policy):
    """The full cache: nothing is ever evicted, so its user must refuse tokens past the bound.

    Attributes:
        bound: most entries; None, the default, means the model's length and holds until `resolve`.
    """

    bound: int | None = None  # type: ignore[assignment]  # an int for everyone after `resolve`

    name: ClassVar[str] = "full"

    def due(self, n: int, sampled: int) -> bool:
        return False

    def compact(self, view: View) -> Compaction:
        """Keep all."""
        return Compaction(view.span(0, view.n), view.sampled)

    def regions(self, n: int, sampled: int, seen: int) -> tuple[Region, ...]:
        """A window on everything."""
        return in_order(n, (Kind.WINDOW, n))

    @property
    def evicts(self) -> bool:
        return False

    def resolve(self, max_positions: int) -> Self:
        """This policy with a concrete bound.

        Raises:
            PolicyError: the bound exceeds the model's positions.
        """
        if self.bound is None:
            return dataclasses.replace(self, bound=max_positions)
        if self.bound > max_positions:
            raise PolicyError(f"{self} exceeds the model's {max_positions} positions")
        return self

    def _scaled(self, bound: int) -> dict[str, int]:
        return {"bound": bound}
