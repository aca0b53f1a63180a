"""What a session's cache keeps: plain immutable data, without protobuf."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from apiary_client.types import State


class EntryKind(enum.StrEnum):
    """Why an entry is in a cache; `apiary.v1.CacheMap.Kind` says more."""

    SINK = "sink"
    """Among the first, which always stay."""
    SAMPLED = "sampled"
    """Left by compactions that thin what is old at intervals."""
    CELL = "cell"
    """Left by a compaction as the best of its cell (or, with `buzz2`, for its importance alone)."""
    HEAVY = "heavy"
    """Left by a compaction for the attention that it received."""
    MIDDLE = "middle"
    """Older than the window, and not yet chosen between."""
    WINDOW = "window"
    """Among the most recent, which always stay."""
    PINNED = "pinned"
    """Among the first, which the policy was asked to keep."""
    UNKNOWN = "unknown"
    """A kind that is newer than this client."""


@dataclass(frozen=True, slots=True)
class MapColumn:
    """The tokens of a transcript from `start` to before `stop`.

    `kind` is that of most entries that are kept of them; None if none is.
    """

    start: int
    stop: int
    kind: EntryKind | None


@dataclass(frozen=True, slots=True)
class KeptToken:
    """A token of a transcript that some head of the layers asked for keeps.

    `text` is what it is, and may hold control characters. `head_count` heads keep it, in all those layers,
    with this mean of its scores (None where the policy records none), as these kinds.
    """

    position: int
    token_id: int
    text: str
    head_count: int
    mean_score: float | None
    kinds: tuple[EntryKind, ...]


@dataclass(frozen=True, slots=True)
class KindCount:
    """How many entries of a layer are of a kind, in all KV heads."""

    kind: EntryKind
    entries: int


@dataclass(frozen=True, slots=True)
class HeadMap:
    """What one KV head keeps: positions in the transcript, ascending, and beside each its score (none at all
    where the policy records none) and kind."""

    positions: tuple[int, ...]
    scores: tuple[float, ...]
    kinds: tuple[EntryKind, ...]


@dataclass(frozen=True, slots=True)
class LayerMap:
    """What one layer keeps: its entries by kind and by column, and in a full map its heads."""

    layer: int
    kinds: tuple[KindCount, ...]
    column_entries: tuple[int, ...]
    heads: tuple[HeadMap, ...]


@dataclass(frozen=True, slots=True)
class CacheMap:
    """Which tokens of its transcript a session's cache keeps; the fields of `apiary.v1.CacheMap`.

    `entries` are those of each layer and KV head. Of the `token_count` tokens that the cache has seen some
    head keeps `kept_token_count`. A full map has all of those in `tokens`, in order; a summary the first few:
    chosen ones before others, and of either those that the most heads keep.
    """

    name: str
    state: State
    policy: str
    entries: int
    kv_heads: int
    token_count: int
    columns: tuple[MapColumn, ...]
    layers: tuple[LayerMap, ...]
    kept_token_count: int
    tokens: tuple[KeptToken, ...]
