"""Engines that use a state directory one after the other: each ends in order, or as if it was killed."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from apiary_server.engine.engine import Engine
from apiary_server.model.loader import LoadedModel
from apiary_server.sessions.store import StoreError
from apiary_server.settings import Settings
from apiary_server.worker import assemble


class _Wire:
    """What leads from a process to its disk, until it is cut; what is being written then arrives whole.

    Attributes:
        is_cut: nothing arrives any more.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.is_cut = False

    def cut(self) -> None:
        """From now on nothing arrives."""
        with self._lock:
            self.is_cut = True

    def through(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """A call that goes this way."""

        def passed(*arguments: Any) -> Any:
            with self._lock:
                if self.is_cut:
                    raise StoreError("the wire is cut")
                return call(*arguments)

        return passed


class Mortal:
    """An engine that a test steps by hand. It has a state directory if its settings name one, and then others
    may come after it.

    Attributes:
        engine: the one that lives.
    """

    engine: Engine

    def __init__(self, loaded: LoadedModel, settings: Settings) -> None:
        self._loaded, self._settings = loaded, settings
        self.begin()

    @property
    def lasts(self) -> bool:
        """Whether there is a state directory."""
        return self._settings.state_dir is not None

    @property
    def file_bytes(self) -> int:
        """Of the snapshots in it."""
        sizes = 0
        directory = self._settings.state_dir
        for path in () if directory is None else (directory / "snapshots").glob("*.snapshot"):
            with contextlib.suppress(FileNotFoundError):  # it was deleted just now
                sizes += path.stat().st_size
        return sizes

    @property
    def rows(self) -> int:
        """How many rows its database has, of sessions and turns; no engine may use it."""
        assert self._settings.state_dir is not None
        with contextlib.closing(sqlite3.connect(self._settings.state_dir / "sessions.db")) as database:
            queries = (f"SELECT COUNT(*) FROM {table}" for table in ("sessions", "turns"))
            return sum(database.execute(query).fetchone()[0] for query in queries)

    @property
    def dead(self) -> bool:
        """Whether the engine was cut off from its disk."""
        return self._wire.is_cut

    def begin(self) -> None:
        """Start an engine."""
        self.engine = engine = assemble(self._settings, self._loaded)
        self._wire = _Wire()
        if engine._journal is None or engine._archive is None:
            return
        for store, methods in (
            (engine._journal._store, ("write",)),
            (engine._archive.shelf._store, ("write", "delete")),
        ):
            for method in methods:
                setattr(store, method, self._wire.through(getattr(store, method)))

    def cut(self) -> None:
        """Have nothing reach the disk any more: for that, the engine is dead from now on."""
        self._wire.cut()

    def die(self) -> None:
        """End as if killed: nothing is stored that was not."""
        self.cut()
        engine = self.engine
        for part in (engine._restorer, engine.porter, engine._admission):
            part.close()
        with torch.inference_mode():
            engine._mailbox.close()
        if engine._journal is not None and engine._archive is not None:
            engine._journal.close(0.0)
            engine._archive.close(0.0)
            assert not engine._journal._thread.is_alive()

    def end(self, grace: float) -> None:
        """End as a worker does: turns may finish for so many seconds, and all is stored."""
        with mock.patch("apiary_server.engine.engine.warm_up"):  # it is warm
            self.engine._thread.start()
        self.engine.stop(grace)
