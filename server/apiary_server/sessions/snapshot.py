"""A snapshot: one session's committed cache as bytes, which can be trusted or are refused.

    bytes        what
    0   to 15    the magic
    16  to 19    the version of this format, little-endian
    20  to 23    m, the length of the manifest, little-endian
    24  to 24+m  the manifest: JSON
    32 more      the seal: HMAC-SHA256 of all before it, by the worker's key; without a key SHA-256
    the rest     safetensors: what of the slot's tensors is in use

The manifest has the SHA-256 of the rest. So nothing is parsed that the seal does not cover, and no number in
a file makes anybody allocate memory: sizes are compared with what the session should have.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from apiary_server.errors import SnapshotRefused
from apiary_server.sessions.compression import Bits, Compression
from apiary_server.sessions.info import RebuildReason
from apiary_server.sessions.pool import SlotLayout
from apiary_server.sessions.session import Session
from buzz import CacheState

VERSION = 1
_MAGIC = b"apiary snapshot\n"
_HEAD = struct.Struct("<16sII")
_SEAL = 32
_LONGEST_MANIFEST = 2**16


class Counts(BaseModel):
    """A cache's counts; see `buzz.CacheState`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    n: int = Field(ge=0, lt=2**31)
    sampled: int = Field(ge=0, lt=2**31)
    seen: int = Field(ge=0, lt=2**31)
    evicted: int = Field(ge=0, lt=2**31)
    rotated_in_cache: bool
    packed: int = Field(ge=0, lt=2**31)
    measured: bool

    @property
    def state(self) -> CacheState:
        """As the cache takes them."""
        return CacheState(**self.model_dump())


class Manifest(BaseModel):
    """What a snapshot is of.

    Attributes:
        model: fingerprint of the model, and of how it is computed.
        tokenizer: digest of the tokenizer.
        policy: whose cache it is.
        turns: how many of the session's turns it has.
        history: digest of those turns, see `history`.
        counts: of the cache; None: there is none, but something else, see `encode`.
        bits: to which it was compressed; None, and then not written: its tensors are as they were.
        signed: whether the seal is by a key.
        size: bytes of the tensors.
        sha256: of the tensors, in hexadecimal digits.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: str
    tokenizer: str
    policy: str
    turns: int = Field(ge=0)
    history: str
    counts: Counts | None
    bits: Bits | None = None
    signed: bool
    size: int = Field(ge=0)
    sha256: str


@dataclass(frozen=True, slots=True)
class Origin:
    """Whose caches a worker can use: its model's and tokenizer's, sealed by its key, if it has one."""

    model: str
    tokenizer: str
    key: bytes | None = None

    def check(self, manifest: Manifest) -> None:
        """Check that a snapshot is of this model and tokenizer.

        Raises:
            SnapshotRefused: it is not.
        """
        self.check_tokenizer(manifest)
        if manifest.model != self.model:
            raise SnapshotRefused(
                "it is of another model, or of this one computed otherwise", RebuildReason.MODEL_CHANGED
            )

    def check_tokenizer(self, manifest: Manifest) -> None:
        """Check that a snapshot's transcript is of this tokenizer.

        Raises:
            SnapshotRefused: it is not.
        """
        if manifest.tokenizer != self.tokenizer:
            raise SnapshotRefused("it is of a model with another tokenizer", RebuildReason.MODEL_CHANGED)


@dataclass(frozen=True, slots=True)
class Image:
    """A committed cache, or none, and what it is of.

    Attributes:
        policy: whose cache it is.
        turns: how many turns it has.
        epoch: of the session.
        history: digest of those turns.
        layout: of the slot.
        state: the cache's counts; None: there is no cache.
        slot: the slot's bytes, uint8 `[bytes]`, in host memory.
    """

    policy: str
    turns: int
    epoch: int
    history: str
    layout: SlotLayout
    state: CacheState | None
    slot: Tensor


def history(session: Session, turns: int) -> str:
    """Digest of a session's first turns: tokens, and where segments ended. Equal ones give equal caches."""
    tokens = sum(turn.tokens for turn in session.turns[:turns])
    ends = [end for stretch in session.segments[: 2 * turns] for end in stretch]
    digest = hashlib.sha256(np.asarray(session.transcript[:tokens], "<u4").tobytes())
    digest.update(np.asarray(ends, "<i8").tobytes())
    return digest.hexdigest()


def without_cache(session: Session) -> Image:
    """What there is of a session that has no cache."""
    turns = len(session.turns)
    empty = torch.empty(0, dtype=torch.uint8)
    return Image(
        str(session.policy), turns, session.epoch, history(session, turns), session.layout, None, empty
    )


def encode(
    image: Image,
    origin: Origin,
    more: Mapping[str, Tensor] | None = None,
    compression: Compression | None = None,
) -> Sequence[bytes]:
    """The bytes of a snapshot, in parts.

    Args:
        image: the cache, if there is one.
        origin: the worker's.
        more: tensors, in host memory, that go with the cache's.
        compression: where it helps, the cache is compressed.
    """
    state, bits = image.state, None
    live = {} if state is None else _live(image.layout, state, image.slot)
    if compression is not None and state is not None and compression.helps(image.layout, state):
        bits = compression.bits
        state, live = compression.compress(state, live)
    tensors = save({name: _copy(tensor) for name, tensor in live.items()} | dict(more or {}))
    manifest = Manifest(
        model=origin.model,
        tokenizer=origin.tokenizer,
        policy=image.policy,
        turns=image.turns,
        history=image.history,
        counts=None if state is None else Counts(**asdict(state)),
        bits=bits,
        signed=origin.key is not None,
        size=len(tensors),
        sha256=hashlib.sha256(tensors).hexdigest(),
    )
    text = manifest.model_dump_json(exclude_defaults=True).encode()
    head = _HEAD.pack(_MAGIC, VERSION, len(text)) + text
    return head, _seal(head, origin.key), tensors


def length(start: bytes, origin: Origin) -> tuple[Manifest, int] | None:
    """The manifest of a snapshot that begins with these bytes, and how many it has; None if they are too few
    to tell.

    Raises:
        SnapshotRefused: they are not the first bytes of a snapshot, or not sealed by the origin's key.
    """
    if len(start) < _HEAD.size:
        return None
    magic, _, size = _HEAD.unpack_from(start)
    if magic == _MAGIC and size <= _LONGEST_MANIFEST and len(start) < _HEAD.size + size + _SEAL:
        return None
    manifest, end = _manifest(start, origin.key)
    return manifest, end + manifest.size


def decode(data: bytes, origin: Origin) -> tuple[Manifest, dict[str, Tensor]]:
    """Read a snapshot, of whatever model.

    Returns:
        What it is of, and its tensors, which are not checked beyond being what was written.

    Raises:
        SnapshotRefused: these are not the bytes of a snapshot, or not sealed by the origin's key.
    """
    manifest, start = _manifest(data, origin.key)
    return manifest, _tensors(data, start, manifest)


def decode_own(data: bytes, origin: Origin) -> tuple[Manifest, dict[str, Tensor]]:
    """As `decode`, a snapshot of the origin's own model; another's is told as such, even if it was cut off.

    Raises:
        SnapshotRefused: also, it is of another model or tokenizer.
    """
    manifest, start = _manifest(data, origin.key)
    origin.check(manifest)
    return manifest, _tensors(data, start, manifest)


def _tensors(data: bytes, start: int, manifest: Manifest) -> dict[str, Tensor]:
    rest = memoryview(data)[start:]
    if len(rest) != manifest.size:
        raise corrupt(f"it has {len(rest):,} bytes of tensors, and should have {manifest.size:,}")
    if hashlib.sha256(rest).hexdigest() != manifest.sha256:
        raise corrupt("its tensors are not what was written")
    try:
        return load(bytes(rest))
    except (SafetensorError, ValueError, KeyError) as error:
        raise corrupt(f"its tensors cannot be read: {error}") from error


def check(layout: SlotLayout, state: CacheState, tensors: Mapping[str, Tensor]) -> None:
    """Check that a snapshot's tensors make a cache.

    Args:
        layout: of its slot.
        state: of the cache.
        tensors: as `decode` returned them.

    Raises:
        SnapshotRefused: they do not make a cache with that state in such a slot.
    """
    live = _live(layout, state, torch.empty(layout.bytes, dtype=torch.uint8, device="meta"))
    if live.keys() != tensors.keys():
        raise corrupt(f"it has the tensors {sorted(tensors)}, and should have {sorted(live)}")
    for name, tensor in live.items():
        given = tensors[name]
        if given.dtype != tensor.dtype or given.shape != tensor.shape:
            raise corrupt(
                f"its {name} is {given.dtype} {tuple(given.shape)}, "
                f"and should be {tensor.dtype} {tuple(tensor.shape)}"
            )
        if name == "position" and not _within(given.numpy(), state.seen):
            raise corrupt(f"it has positions beyond its {state.seen:,} tokens")


def fill(slot: Tensor, layout: SlotLayout, state: CacheState, tensors: Mapping[str, Tensor]) -> None:
    """Write a snapshot's tensors, which were checked, to a slot: its bytes, uint8 `[bytes]`, wherever."""
    for name, tensor in _live(layout, state, slot).items():
        tensor.copy_(tensors[name])


def _live(layout: SlotLayout, state: CacheState, slot: Tensor) -> dict[str, Tensor]:
    """What of a slot's tensors is in use: views of it.

    Raises:
        SnapshotRefused: a cache with that state does not fit the slot.
    """
    if state.packed > state.n or state.seen != state.n + state.evicted:
        raise corrupt(f"{state} is no state of a cache")
    dense = state.n - state.packed
    used = {"keys": dense, "values": dense, "scales": dense, "position": state.n, "state": state.n}
    live = {}
    for name, tensors in layout.views(slot[None]).items():
        tensor, axis = tensors[0], 3 if name in ("state", "scales") else 2
        if name == "saved_state" or (name == "channels" and not state.measured):
            continue
        if name != "channels":
            count = used.get(name, state.packed)
            if count > tensor.shape[axis]:
                raise corrupt(f"{count} entries of {name} do not fit the slot's {tensor.shape[axis]}")
            if count == 0:
                continue
            tensor = tensor.narrow(axis, 0, count)
        live[name] = tensor
    return live


def _within(positions: NDArray[np.int32], seen: int) -> bool:
    return bool((positions >= 0).all() and (positions < seen).all())


def _copy(tensor: Tensor) -> Tensor:
    """In memory of its own, by numpy: without torch's threads, which would be in the way of a step's."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype)
    copy.view(torch.uint8).numpy()[...] = tensor.view(torch.uint8).numpy()
    return copy


def _manifest(data: bytes, key: bytes | None) -> tuple[Manifest, int]:
    """The manifest, and where the tensors begin."""
    if len(data) < _HEAD.size:
        raise corrupt("it is cut off")
    magic, version, length = _HEAD.unpack_from(data)
    if magic != _MAGIC:
        raise corrupt("it is no snapshot")
    if version != VERSION:
        raise corrupt(f"it has format {version}, and this worker knows {VERSION}")
    end = _HEAD.size + length
    if length > _LONGEST_MANIFEST or len(data) < end + _SEAL:
        raise corrupt("it is cut off")
    if not hmac.compare_digest(data[end : end + _SEAL], _seal(data[:end], key)):
        raise corrupt("its seal is broken" if key is None else "it is not signed by this worker's key")
    try:
        return Manifest.model_validate_json(data[_HEAD.size : end]), end + _SEAL
    except ValidationError as error:
        raise corrupt(f"its manifest is malformed: {error.error_count()} faults") from error


def _seal(head: bytes, key: bytes | None) -> bytes:
    return hashlib.sha256(head).digest() if key is None else hmac.digest(key, head, "sha256")


def corrupt(why: str) -> SnapshotRefused:
    """The refusal of what is damaged."""
    return SnapshotRefused(why, RebuildReason.SNAPSHOT_CORRUPT)
