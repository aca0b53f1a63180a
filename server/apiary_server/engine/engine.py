"""The engine: one thread runs torch in a loop; everyone else talks to it through here."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

import structlog
import torch

from apiary_server.engine.admission import Admission
from apiary_server.engine.cache_map import CacheCopy, CacheMap, draw
from apiary_server.engine.delivery import TokenStream
from apiary_server.engine.door import Door
from apiary_server.engine.keeper import Keeper
from apiary_server.engine.loop import Loop
from apiary_server.engine.mailbox import Mailbox
from apiary_server.engine.places import Place
from apiary_server.engine.porter import Porter
from apiary_server.engine.request import CacheMapRequest, Messages, Text, TurnRequest
from apiary_server.engine.restorer import Restorer
from apiary_server.engine.result import Capacity, ModelInfo
from apiary_server.engine.scheduler import Scheduler
from apiary_server.engine.warmup import warm_up
from apiary_server.sessions.archive import Archive
from apiary_server.sessions.journal import Journal
from apiary_server.sessions.manager import SessionManager
from apiary_server.sessions.snapshot import Origin
from buzz import Rotary

_LAST_WRITE = 5.0  # seconds that a store has at the end
_LAST_SNAPSHOTS = 10.0  # seconds for the snapshots that are missing then
_log = structlog.get_logger(__name__)


class Engine:
    """Runs turns. All methods may be called from any thread.

    Args:
        model: the served model and its limits.
        door: turns requests into turns, or refuses them.
        scheduler: which turns may wait.
        mailbox: what the engine thread is asked for.
        restorer: brings caches back that are stored.
        loop: what that thread does.
        sessions: the table of sessions.
        step_limit: seconds after which a step hangs.
        origin: whose caches are taken in.
        rotary: the model's.
        journal: what stores sessions; None: nothing does.
        archive: what stores their caches; None: nothing does.

    Attributes:
        sessions: the table of sessions.
        keeper: what is done to them between their turns.
        porter: takes them out, and others in.
        healthy: False once the loop hung or broke; the process should end.
        on_unhealthy: called when that happens.
    """

    def __init__(
        self,
        model: ModelInfo,
        door: Door,
        scheduler: Scheduler,
        mailbox: Mailbox,
        restorer: Restorer,
        loop: Loop,
        sessions: SessionManager,
        step_limit: float,
        origin: Origin,
        rotary: Rotary,
        journal: Journal | None = None,
        archive: Archive | None = None,
    ) -> None:
        self._restorer = restorer
        self.model = model
        self.sessions = sessions
        self.keeper = Keeper(sessions, loop.residency, mailbox, loop, self._restorer, archive)
        self.porter = Porter(self.keeper, sessions, self._restorer, origin, rotary, model.vocab_size)
        self.healthy = True
        self.on_unhealthy: Callable[[], None] | None = None
        self._door = door
        self._scheduler = scheduler
        self._mailbox = mailbox
        self._loop = loop
        self._step_limit = step_limit
        self._journal = journal
        self._archive = archive
        if archive is not None:
            archive.start(mailbox.call, loop.residency.image, lambda: self._working)
        self._admission = Admission(door, scheduler, mailbox, loop, sessions)
        self._rotary = rotary
        self._warm = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Start the loop and its watchdog. Returns when the next step takes no longer than any other."""
        self._thread.start()
        self._watchdog.start()
        self._restorer.start(lambda: self._busy)
        self._warm.wait()

    def drain(self) -> None:
        """Take no new turns; those in flight go on."""
        self._admission.drain()

    def stop(self, grace: float) -> None:
        """Let turns finish for `grace` seconds, roll the others back or keep what was delivered of them, and
        end the loop."""
        self.drain()
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline and self._thread.is_alive() and self._busy:
            time.sleep(0.02)
        self._stopping.set()
        self._mailbox.post(lambda: None)
        self._thread.join(timeout=self._step_limit)
        self._restorer.close()
        self.porter.close()
        self._admission.close()
        if self._journal is not None:
            self._journal.close(_LAST_WRITE)
        if self._archive is not None and not self._thread.is_alive():
            self._archive.close(_LAST_SNAPSHOTS)

    def reserve(self, tenant: str) -> Place:
        """Take a place in the queue for a turn of a tenant; see `Admission.reserve`."""
        return self._admission.reserve(tenant)

    def open(self, request: TurnRequest, stream: TokenStream, place: Place | None = None) -> Future[None]:
        """Check a request and queue its turn; see `Admission.open`."""
        return self._admission.open(request, stream, place)

    def tokenize(self, input: Text | Messages) -> list[int]:
        """Token ids of text, or of messages as a first turn."""
        return self._door.tokenizer.encode(input)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of token ids. Raises InvalidField if one is not in the vocabulary."""
        return self._door.tokenizer.decode(ids)

    def cache_map(self, copy: CacheCopy, request: CacheMapRequest, most_bytes: int) -> CacheMap:
        """The map of a cache of which `keeper.look` made a copy; see `draw`."""
        return draw(copy, request, self._door.tokenizer.pieces, most_bytes)

    def capacity(self) -> Capacity:
        """Budgets and what is in use."""
        residency = self._loop.residency
        pool, shelf = residency.pool, None if self._archive is None else self._archive.shelf
        parts = {"sessions": self._journal, "caches": self._archive}
        failing = [
            f"{what}: {error}" for what, part in parts.items() if part is not None and (error := part.error)
        ]
        return Capacity(
            budget_bytes=pool.budget,
            used_bytes=pool.used_bytes,
            peak_bytes=pool.peak_bytes,
            workspace_bytes=pool.workspace_bytes,
            workspaces=pool.workspaces,
            slot_bytes=pool.default.bytes,
            reserve_slots=residency.reserve,
            max_resident_sessions=pool.places(pool.default) - residency.reserve,
            resident_sessions=residency.resident_sessions,
            parked_sessions=residency.parked_sessions,
            parked_bytes=residency.parked_bytes,
            parked_budget_bytes=residency.parked_budget,
            sessions=len(self.sessions),
            running_turns=len(self._scheduler.running),
            queued_turns=len(self._scheduler.waiting) + len(self._admission),
            queue_limit=self._scheduler.queue_limit,
            store_degraded=bool(failing),
            stored_sessions=0 if shelf is None else len(shelf),
            stored_bytes=0 if shelf is None else shelf.used_bytes,
            stored_budget_bytes=0 if shelf is None else shelf.budget,
            unread_sessions=0 if self._journal is None else self._journal.unread,
            store_error="; ".join(failing),
        )

    def moves(self) -> Mapping[str, int]:
        """How many caches went where so far: `parked`, `unparked`, `saved`, `stored` (and left memory),
        `loaded`; or were `lost`, since there was no room and the store took none."""
        saved = {} if self._archive is None else {"saved": self._archive.saved}
        return {**self._loop.residency.moves, **saved}

    @property
    def _working(self) -> bool:
        """Whether somebody would notice that snapshots take time."""
        return bool(self._scheduler.running) or self.keeper.busy

    @property
    def _busy(self) -> bool:
        return bool(self._admission or self._scheduler.waiting or self._scheduler.running)

    # the engine thread

    def _run(self) -> None:
        with torch.inference_mode():
            try:
                try:
                    session = self.sessions.one_shot("", None)
                    warm_up(self._loop.runner, self._loop.residency, session, self._rotary)
                finally:
                    self._warm.set()
                while not self._stopping.is_set():
                    self._loop.step()
                self._loop.end_all()
            except Exception:
                _log.exception("the engine loop broke")
                self._lose_health()
            finally:
                self._mailbox.close()

    # the watchdog thread

    def _watch(self) -> None:
        limit = self._step_limit
        while self.healthy and not self._stopping.wait(min(1.0, limit / 4)):
            began = self._loop.step_began
            if began is not None and time.monotonic() - began > limit:
                _log.critical("a step hangs", seconds=round(time.monotonic() - began, 1))
                self._lose_health()

    def _lose_health(self) -> None:
        self.healthy = False
        if self.on_unhealthy is not None:
            self.on_unhealthy()
