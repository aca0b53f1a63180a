"""Puts a worker's engine together from its settings."""

from __future__ import annotations

import functools
import math

import structlog
import torch

from apiary_server.engine.door import Door
from apiary_server.engine.engine import Engine
from apiary_server.engine.loop import Loop
from apiary_server.engine.mailbox import Mailbox
from apiary_server.engine.restorer import Restorer
from apiary_server.engine.result import ModelInfo, Observer
from apiary_server.engine.scheduler import Scheduler
from apiary_server.errors import InvalidField
from apiary_server.model.catalog import resolve
from apiary_server.model.fingerprint import fingerprint
from apiary_server.model.loader import LoadedModel, load
from apiary_server.model.runner import Runner
from apiary_server.sessions.archive import Archive
from apiary_server.sessions.journal import Journal
from apiary_server.sessions.manager import SessionManager
from apiary_server.sessions.parking import parking_of
from apiary_server.sessions.pool import Pool, SlotLayout
from apiary_server.sessions.residency import Residency
from apiary_server.sessions.shelf import Shelf
from apiary_server.sessions.snapshot import Origin
from apiary_server.settings import Settings
from apiary_server.stores import Stores, open_stores
from apiary_server.threads import apart
from buzz import Policy, PolicyError, parse
from buzz.quant import GROUP

_log = structlog.get_logger(__name__)
_POLICIES = 256  # that are kept at hand
_PATIENCE = 5.0  # seconds for which a turn lets others go first that have room
_SHORTEST_KEY = 16  # bytes


class Layouts:
    """Policies as this worker can hold them: resolved against the model, with the layout of their slots."""

    def __init__(self, loaded: LoadedModel, settings: Settings) -> None:
        self._geometry = loaded.geometry
        self._max_positions = loaded.rotary.max_positions
        self._default = settings.policy
        self._slack = settings.slack
        # rotary positions inside a workspace are in-cache indices, so it is never longer than the model
        self.workspace_entries = min(settings.workspace_entries, self._max_positions)
        self.pool: Pool | None = None
        self._reserve = settings.reserve_slots
        self._resolved = functools.lru_cache(_POLICIES)(self._resolve)  # sessions share them

    def __call__(self, spec: str | None) -> tuple[Policy, SlotLayout]:
        """The policy of a spec (None: the default) and its slots.

        Raises:
            InvalidField: `policy` is malformed, or too large for the model, the workspace or the budget.
        """
        policy, layout = self._resolved(self._default if spec is None else spec)
        if self.pool is not None and self.pool.places(layout) <= self._reserve:
            raise InvalidField(
                [
                    (
                        "policy",
                        f"{policy} needs {self._reserve + 1} slots of {layout.bytes:,} bytes, "
                        f"{(self._reserve + 1) * layout.bytes:,} together, and the cache budget leaves "
                        f"{self.pool.arena_bytes:,} for slots",
                    )
                ]
            )
        return policy, layout

    def _resolve(self, spec: str) -> tuple[Policy, SlotLayout]:
        try:
            policy = parse(spec).resolve(self._max_positions)
        except PolicyError as error:
            raise InvalidField([("policy", str(error))]) from error
        if policy.kivi is not None and self._geometry.head_dim % GROUP:
            raise InvalidField(
                [
                    (
                        "policy",
                        f"{policy} quantises {GROUP} channels together, and the heads of this model have "
                        f"{self._geometry.head_dim}, which is no multiple of that: leave out kivi",
                    )
                ]
            )
        if policy.evicts and policy.bound + self._slack > self.workspace_entries:
            raise InvalidField(
                [
                    (
                        "policy",
                        f"{policy} holds up to {policy.bound} entries; with {self._slack} of slack that is "
                        f"more than the {self.workspace_entries} of a workspace",
                    )
                ]
            )
        return policy, SlotLayout.of(self._geometry, policy, self._slack)


def build(settings: Settings, observer: Observer | None = None) -> Engine:
    """Load the model, lay out the memory, and return an engine that is ready to `start`.

    Raises:
        ModelUnavailable, UnservableModel: there is no such model, or it cannot be served.
        InvalidField: the default policy is malformed or does not fit.
        ValueError: torch has no such device, or the cache budget is too small, or more than there is.
    """
    return assemble(settings, load_model(settings), observer)


def load_model(settings: Settings) -> LoadedModel:
    """Load the model that the settings name.

    Raises:
        ModelUnavailable, UnservableModel: there is no such model, or it cannot be served.
        ValueError: torch has no such device.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = _device(settings.device)
    dtype, cache_dtype = getattr(torch, settings.dtype), getattr(torch, settings.cache_dtype)
    path = resolve(settings.model)
    return apart(lambda: load(path, device, dtype, cache_dtype, settings.backend, settings.weights))


def assemble(settings: Settings, loaded: LoadedModel, observer: Observer | None = None) -> Engine:
    """`build` over a model that `load_model` loaded; engines may share it, one after the other.

    Raises:
        InvalidField: the default policy is malformed or does not fit.
        ValueError: the cache budget is too small, or more than there is, or the model's caches cannot be
            compressed.
        StoreError: the state directory, or the store, cannot be used.
    """
    device = loaded.backend.device
    layouts = Layouts(loaded, settings)
    policy, layout = layouts(None)
    try:
        pool = apart(
            lambda: Pool(
                loaded.geometry,
                settings.cache_budget,
                layout,
                settings.workspaces,
                layouts.workspace_entries,
                device,
            )
        )
    except RuntimeError as error:  # torch's way to say that there is not as much memory
        raise ValueError(f"{device} has no {settings.cache_budget:,} bytes for the cache budget") from error
    layouts.pool = pool
    layouts(None)  # the default policy must fit the budget, too
    model = _info(settings, loaded, policy)
    sessions = SessionManager(layouts, settings.session_ttl, settings.max_sessions)
    origin = _origin(settings, loaded)
    stores = open_stores(settings, loaded.tokenizer.digest)
    journal = _journal(settings, stores, sessions)
    archive = _archive(settings, stores, loaded, sessions, origin)
    parking = parking_of(device, settings.parked_budget)
    residency = Residency(pool, settings.reserve_slots, settings.parked_budget, parking, archive)
    mailbox = Mailbox()
    restorer = Restorer(archive, sessions, residency, mailbox)
    scheduler = Scheduler(
        settings.step_tokens,
        settings.max_running,
        settings.queue_limit,
        settings.decode_slowdown,
        settings.tenant_weights,
        math.inf if archive is None else _PATIENCE,  # without a store nobody makes room for it
    )
    return Engine(
        model=model,
        door=Door(model, loaded.tokenizer, sessions, residency, loaded.rotary, scheduler),
        scheduler=scheduler,
        mailbox=mailbox,
        restorer=restorer,
        loop=Loop(
            mailbox,
            Runner(loaded.backend),
            scheduler,
            sessions,
            residency,
            observer or Observer(),
            settings.reattach_grace,
            journal,
        ),
        sessions=sessions,
        step_limit=settings.step_limit,
        origin=origin,
        rotary=loaded.rotary,
        journal=journal,
        archive=archive,
    )


def _journal(settings: Settings, stores: Stores | None, sessions: SessionManager) -> Journal | None:
    """Take up the sessions of the store, and store them from now on."""
    if stores is None:
        return None
    for stored in stores.sessions.load():
        sessions.restore(stored)
    _log.info("sessions taken up", count=len(sessions), store=stores.place)
    return Journal(sessions, stores.sessions, settings.store_patience)


def _origin(settings: Settings, loaded: LoadedModel) -> Origin:
    """Whose caches the worker can use."""
    key = None if settings.snapshot_key_file is None else settings.snapshot_key_file.read_bytes().strip()
    if key is not None and len(key) < _SHORTEST_KEY:
        raise ValueError(
            f"the key in {settings.snapshot_key_file} has {len(key)} bytes, and {_SHORTEST_KEY} are the "
            "least: make one with `openssl rand -hex 32`"
        )
    how = (settings.weights, settings.dtype, settings.cache_dtype)
    return Origin(fingerprint(resolve(settings.model), *how), loaded.tokenizer.digest, key)


def _archive(
    settings: Settings, stores: Stores | None, loaded: LoadedModel, sessions: SessionManager, origin: Origin
) -> Archive | None:
    """Take up the snapshots of the stored sessions, and make others from now on."""
    if stores is None:
        return None
    bits, head_dim = settings.snapshot_bits, loaded.geometry.head_dim
    if bits is not None and head_dim % GROUP:
        raise ValueError(
            f"--snapshot-bits quantises {GROUP} channels together, and the heads of this model have "
            f"{head_dim}, which is no multiple of that: leave it out"
        )
    shelf = Shelf(stores.snapshots, settings.stored_budget, settings.checkpoints)
    shelf.take_up(reversed(sessions.latest()))
    delay = settings.snapshot_delay if settings.durability == "idle" else 0.0
    return Archive(sessions, shelf, origin, loaded.rotary, delay, bits)


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"device {name!r} cannot be used: {reason}") from error


def _info(settings: Settings, loaded: LoadedModel, policy: Policy) -> ModelInfo:
    geometry = loaded.geometry
    return ModelInfo(
        name=settings.model.rstrip("/").rpartition("/")[2],
        architecture=loaded.architecture,
        layers=geometry.layers,
        query_heads=loaded.query_heads,
        kv_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
        vocab_size=loaded.tokenizer.vocab_size,
        max_positions=loaded.rotary.max_positions,
        weight_dtype=settings.dtype if settings.weights == "fp32" else settings.weights,
        cache_dtype=settings.cache_dtype,
        default_policy=str(policy),
        default_max_tokens=min(settings.default_max_tokens, settings.max_tokens),
        max_tokens=settings.max_tokens,
        max_prompt_tokens=settings.max_prompt_tokens,
        eos_token_ids=loaded.eos_token_ids,
        chat=loaded.tokenizer.chat,
    )
