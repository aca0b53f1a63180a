"""Which tokens a session's cache keeps, and why: what the engine thread copies, and what is told of that."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from apiary_server.engine.request import CacheMapRequest
from apiary_server.errors import InvalidField
from apiary_server.sessions.info import State
from apiary_server.sessions.session import Session
from buzz import Buffers, Policy, Region
from buzz import Kind as Kind
from buzz.compaction import regions as regions_of

_Numbers: TypeAlias = NDArray[Any]

_KINDS = tuple(Kind)
_CHOSEN = [_KINDS.index(kind) for kind in (Kind.SAMPLED, Kind.CELL, Kind.HEAVY)]
# The most bytes that these take of a message: the frame, an entry (position, score, kind), a token beside its
# text, a column, a layer, a head, and the number of a layer's entries in a column.
_FRAME, _ENTRY, _TOKEN, _COLUMN, _LAYER, _HEAD, _COUNT = 512, 10, 64, 20, 96, 24, 5


@dataclass(frozen=True, slots=True)
class CacheCopy:
    """What is known of a cache's entries at one moment, in host memory.

    Attributes:
        id: of the session.
        policy: whose cache it is.
        state: where it lies.
        sampled: see `buzz.Cache`.
        seen: see `buzz.Cache`.
        position: int32 `[layers, kv_heads, n]`, original token positions, ascending; n is 0 without a cache.
        score: the first mass that the policy declares, `[layers, kv_heads, n]`; None if it declares none.
        tokens: the transcript's first `seen`.
    """

    id: str
    policy: Policy
    state: State
    sampled: int
    seen: int
    position: NDArray[np.int32]
    score: NDArray[np.floating[Any]] | None
    tokens: array[int]


@dataclass(frozen=True, slots=True)
class Column:
    """The transcript's tokens from `start` to before `stop`, and of which kind most of their entries are."""

    start: int
    stop: int
    kind: Kind | None


@dataclass(frozen=True, slots=True)
class KeptToken:
    """A token that some head keeps: how many do, the mean of its scores there, and as what they keep it."""

    position: int
    token_id: int
    text: str
    head_count: int
    mean_score: float | None
    kinds: Sequence[Kind]


@dataclass(frozen=True, slots=True)
class LayerMap:
    """What a layer keeps.

    Attributes:
        layer: which.
        column_entries: `[columns]`, entries in each column, of all heads.
        positions: `[kv_heads, n]`, or None in a summary.
        scores: the same, or None if there are none.
    """

    layer: int
    column_entries: _Numbers
    positions: _Numbers | None
    scores: _Numbers | None


@dataclass(frozen=True, slots=True)
class CacheMap:
    """Which tokens a cache keeps. `apiary.v1.CacheMap` has it in other words.

    Attributes:
        id: of the session.
        policy: whose cache it is.
        state: where it lies.
        entries: n, of each layer and head.
        kv_heads: of each layer.
        seen: tokens of the transcript that it has seen.
        regions: why entries are there, the same in all layers and heads.
        columns: the transcript in pieces.
        layers: those asked for.
        kept: how many tokens some head of those keeps.
        tokens: all of those in order, or the first of a summary.
    """

    id: str
    policy: str
    state: State
    entries: int
    kv_heads: int
    seen: int
    regions: Sequence[Region]
    columns: Sequence[Column]
    layers: Sequence[LayerMap]
    kept: int
    tokens: Sequence[KeptToken]


def copy_of(session: Session, buffers: Buffers | None) -> CacheCopy:
    """Copy what a map needs to know of an idle session.

    Args:
        session: it.
        buffers: where its entries lie; None if it has no cache.
    """
    cache, shape = session.cache, session.layout.geometry
    n = 0 if cache is None else cache.n
    mass = next((state.name for state in session.policy.states if state.kind == "mass"), None)
    position: NDArray[np.int32] = np.empty((shape.layers, shape.kv_heads, 0), np.int32)
    score: NDArray[np.floating[Any]] | None = None if mass is None else np.empty(position.shape, np.float32)
    if buffers is not None:
        position = buffers.position[:, :, :n].to("cpu", copy=True).numpy()
        score = None if mass is None else buffers.state[mass][:, :, :n].to("cpu", copy=True).numpy()
    return CacheCopy(
        id=session.id,
        policy=session.policy,
        state=session.tier,
        sampled=0 if cache is None else cache.sampled,
        seen=0 if cache is None else cache.seen,
        position=position,
        score=score,
        tokens=session.transcript[: 0 if cache is None else cache.seen],
    )


def draw(
    copy: CacheCopy,
    request: CacheMapRequest,
    pieces: Callable[[Sequence[int], Sequence[int]], Sequence[str]],
    most_bytes: int,
) -> CacheMap:
    """Draw the map.

    Args:
        copy: of what.
        request: how.
        pieces: the text of each token at some places of a transcript.
        most_bytes: the largest message that a full map may become.

    Raises:
        InvalidField: there is no such layer, or the full map would be larger.
    """
    count, kv_heads, n = copy.position.shape
    if wrong := [(place, layer) for place, layer in enumerate(request.layers) if layer >= count]:
        why = f"the model has the layers 0 to {count - 1}"
        raise InvalidField([(f"layers[{place}]", f"is {layer}, and {why}") for place, layer in wrong])
    layers = request.layers or tuple(range(count))
    position = copy.position[list(layers)]
    score = None if copy.score is None else copy.score[list(layers)]
    regions = regions_of(copy.policy, n, copy.sampled, copy.seen)
    lengths = np.array([region.stop - region.start for region in regions], np.int64)
    kind = np.repeat(np.array([_KINDS.index(region.kind) for region in regions], np.int64), lengths)
    columns, column_entries = _columns(copy.seen, request.column_count, position, kind)
    order, statistics = _statistics(position, score, kind)
    order = np.sort(order) if request.full else order[: request.token_limit]
    if request.full:  # before the texts are made
        _check_size(position, len(columns), len(order), 0, most_bytes)
    places = statistics.position[order].tolist()
    texts = pieces(copy.tokens, places)
    if request.full:
        _check_size(position, len(columns), len(order), sum(len(text.encode()) for text in texts), most_bytes)
    return CacheMap(
        id=copy.id,
        policy=str(copy.policy),
        state=copy.state,
        entries=n,
        kv_heads=kv_heads,
        seen=copy.seen,
        regions=regions,
        columns=columns,
        layers=[
            LayerMap(
                layer=layer,
                column_entries=column_entries[row],
                positions=position[row] if request.full else None,
                scores=score[row] if request.full and score is not None else None,
            )
            for row, layer in enumerate(layers)
        ],
        kept=len(statistics.position),
        tokens=[
            KeptToken(
                position=place,
                token_id=copy.tokens[place],
                text=text,
                head_count=int(statistics.head_count[index]),
                mean_score=None if statistics.mean is None else float(statistics.mean[index]),
                kinds=[each for each, has in zip(_KINDS, statistics.kinds[:, index], strict=True) if has],
            )
            for index, place, text in zip(order.tolist(), places, texts, strict=True)
        ],
    )


@dataclass(frozen=True, slots=True)
class _Statistics:
    """Of each kept token, in order: `position`, `head_count` and `mean` `[kept]`, `kinds` `[kinds, kept]`."""

    position: _Numbers
    head_count: _Numbers
    mean: _Numbers | None
    kinds: _Numbers


def _statistics(position: _Numbers, score: _Numbers | None, kind: _Numbers) -> tuple[_Numbers, _Statistics]:
    """The kept tokens, and in which order a summary has them."""
    kept, token = np.unique(position, return_inverse=True)
    token = token.reshape(position.shape)
    head_count = np.bincount(token.ravel(), minlength=len(kept))
    mean = None
    if score is not None:
        mean = np.bincount(token.ravel(), weights=score.ravel(), minlength=len(kept)) / head_count
    kinds = np.zeros((len(_KINDS), len(kept)), bool)
    for each in np.unique(kind):
        kinds[each, token[..., kind == each]] = True
    keys = (kept, *(() if mean is None else (-mean,)), -head_count, ~kinds[_CHOSEN].any(0))
    return np.lexsort(keys), _Statistics(kept, head_count, mean, kinds)


def _columns(
    seen: int, most: int, position: _Numbers, kind: _Numbers
) -> tuple[Sequence[Column], Sequence[_Numbers]]:
    """At most so many columns, and each layer's entries in them."""
    count = min(most, seen)
    edges = np.arange(count + 1) * seen // max(count, 1)
    column = np.searchsorted(edges, position, side="right") - 1
    entries = [np.bincount(layer.ravel(), minlength=count) for layer in column]
    by_kind = np.bincount((column * len(_KINDS) + kind).ravel(), minlength=count * len(_KINDS))
    by_kind = by_kind.reshape(count, len(_KINDS))
    numbers = (edges[:-1], edges[1:], by_kind.argmax(axis=1), by_kind.max(axis=1))
    columns = [
        Column(start, stop, _KINDS[most] if there else None)
        for start, stop, most, there in zip(*(each.tolist() for each in numbers), strict=True)
    ]
    return columns, entries


def _check_size(position: _Numbers, columns: int, tokens: int, text_bytes: int, most: int) -> None:
    """Refuse a full map that may take more than `most` bytes."""
    layers, kv_heads, n = position.shape
    beside = _FRAME + _COLUMN * columns + _TOKEN * tokens + text_bytes
    layer = _LAYER + _COUNT * columns + kv_heads * (_HEAD + _ENTRY * n)
    if beside + layers * layer <= most:
        return
    fitting = max(0, most - beside) // layer
    why = (
        f"in full, {layers} layers with {position.size:,} entries take up to {beside + layers * layer:,} "
        f"bytes, and a message has at most {most:,}: "
    )
    raise InvalidField([("layers", why + (f"name at most {fitting}" if fitting else "take the summary"))])
