"""Engines to be measured, over one loaded model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal, TypeVar

from pydantic import ValidationError

from apiary_bench.engine.bare import Bare
from apiary_bench.errors import SettingsError
from apiary_server.engine.result import Observer
from apiary_server.sessions.pool import SlotLayout
from apiary_server.settings import Settings
from apiary_server.worker import Layouts, assemble, load_model

_Made = TypeVar("_Made")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Settings of the measured worker, by their names; None: the worker's own default.

    `cache_budget` is the exception: None is as much as the sessions of a measurement need, so that none waits
    for memory or is parked.
    """

    model: str | None = None
    policy: str | None = None
    weights: Literal["fp32", "int8"] | None = None
    backend: Literal["auto", "reference", "cpu", "cuda"] | None = None
    cache_dtype: Literal["float32", "bfloat16", "float16", "int8"] | None = None
    step_tokens: int | None = None
    cache_budget: str | None = None
    threads: int | None = None


class Workbench:
    """A loaded model, and engines over it, to be measured one after the other.

    Args:
        setup: of the engines.

    Attributes:
        settings: the same with all defaults.
        loaded: the model.
        policy: of the sessions, resolved.
        layout: of their slots.

    Raises:
        SettingsError: a setting is malformed or out of range.
        ModelUnavailable, UnservableModel: there is no such model, or it cannot be served so.
        InvalidField: the policy is malformed or does not fit the model.
    """

    def __init__(self, setup: Setup) -> None:
        self.settings = _settings(setup)
        self.loaded = _explained(lambda: load_model(self.settings))
        self._layouts = Layouts(self.loaded, self.settings)
        self.policy, self.layout = self._layouts(None)
        self._enough = setup.cache_budget is None

    def engine(
        self, sessions: int, observer: Observer | None = None, parked_budget: int | None = None
    ) -> Bare:
        """An engine in which so many sessions may have a turn in flight.

        Args:
            sessions: how many.
            observer: receives its numbers.
            parked_budget: bytes for idle sessions; by default the worker's.

        Raises:
            SettingsError: the cache budget is too small, or more than there is.
        """
        settings = self.settings
        changes = {
            "max_running": max(settings.max_running, sessions),
            "queue_limit": max(settings.queue_limit, sessions),
            "max_sessions": max(settings.max_sessions, sessions),
        }
        if self._enough:
            changes["cache_budget"] = self.needed(sessions)
        if parked_budget is not None:
            changes["parked_budget"] = parked_budget
        settings = settings.model_copy(update=changes)
        return Bare(_explained(lambda: assemble(settings, self.loaded, observer)))

    def needed(self, sessions: int) -> int:
        """The cache budget, bytes, in which no turn of so many sessions waits: two slots for each, since a
        turn that compacts keeps the state before it, beside the reserve and the workspaces."""
        settings = self.settings
        workspace = SlotLayout.of_workspace(self.loaded.geometry, self._layouts.workspace_entries)
        slots = 2 * sessions + settings.reserve_slots
        return settings.workspaces * workspace.bytes + slots * self.layout.bytes


def _settings(setup: Setup) -> Settings:
    try:
        return Settings.load(**asdict(setup))
    except ValidationError as error:
        first = error.errors()[0]
        why = first.get("ctx", {}).get("error") or f"{first['msg']}, got {first['input']!r}"
        raise SettingsError(": ".join([*map(str, first["loc"]), str(why)])) from error


def _explained(make: Callable[[], _Made]) -> _Made:
    """Whatever the worker's parts say of their settings, said as a benchmark's error."""
    try:
        return make()
    except ValueError as error:
        raise SettingsError(str(error)) from error
