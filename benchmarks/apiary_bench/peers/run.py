"""Runs workloads on engines: one engine at a time, and with every repeat in the other order."""

from __future__ import annotations

import asyncio
import textwrap
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import TypeAlias

from apiary_bench.errors import LoadError
from apiary_bench.peers import driver
from apiary_bench.peers.engine import Engine, EngineError, Identity, Peer
from apiary_bench.peers.measures import Void, measure
from apiary_bench.peers.results import PointResult, Results, Run
from apiary_bench.peers.workload import Point, Workload
from apiary_bench.progress import Observer
from apiary_bench.serving.record import Record

Keep: TypeAlias = Callable[[Results], None]
_REASON = 300  # characters of why a point is void


async def run(
    peers: Sequence[Peer],
    workloads: Sequence[Workload],
    *,
    repeats: int,
    seed: int,
    vocab_size: int,
    limit: float,
    results: Results,
    observe: Observer,
    keep: Keep,
) -> None:
    """Measure everything that `results` does not have, and add it there.

    Args:
        peers: engines to start.
        workloads: what to give them.
        repeats: how often.
        seed: of the tokens.
        vocab_size: of the model.
        limit: seconds that a point may take, its history included; a point that takes longer is void, and its
            engine is spared the workload's next points.
        results: takes the runs.
        observe: hears of every turn that ended.
        keep: is called with the results after every run.
    """
    ended = {(peer.name, workload.name): count(1) for peer in peers for workload in workloads}
    for repeat, workload, peer in plan(peers, workloads, repeats):
        stage, total = f"{workload.name}: {peer.name}", workload.turns * repeats
        turns = ended[peer.name, workload.name]

        def heard(stage: str = stage, turns: Iterator[int] = turns, total: int = total) -> None:
            observe(stage, next(turns), total)

        if not results.done(peer.name, workload.name, repeat):
            observe(stage, workload.turns * repeat, total)
            results.runs.append(
                await _measure(peer, workload, repeat, _Settings(seed, vocab_size, limit), heard)
            )
            keep(results)
        ended[peer.name, workload.name] = count(workload.turns * (repeat + 1) + 1)  # whatever was left out
        observe(stage, workload.turns * (repeat + 1), total)


def plan(
    peers: Sequence[Peer], workloads: Sequence[Workload], repeats: int
) -> Iterator[tuple[int, Workload, Peer]]:
    """In which order: the peers of a workload follow each other, the other way round in every other repeat,
    so that what drifts on the machine does not favour one."""
    for repeat in range(repeats):
        for workload in workloads:
            for peer in peers if repeat % 2 == 0 else reversed(peers):
                yield repeat, workload, peer


class _Settings:
    def __init__(self, seed: int, vocab_size: int, limit: float) -> None:
        self.seed = seed
        self.vocab_size = vocab_size
        self.limit = limit


async def _measure(
    peer: Peer, workload: Workload, repeat: int, settings: _Settings, ended: Callable[[], None]
) -> Run:
    identity: Identity | None = None
    points: list[PointResult] = []
    try:
        async with peer.start(workload) as engine:
            identity = engine.identity
            for point in workload.points:
                found = await _point(engine, workload, point, repeat, settings, ended)
                points.append(found)
                if found.measures is None:
                    break
    except EngineError as error:
        if len(points) < len(workload.points) and (not points or points[-1].void is None):
            points.append(_void(workload.points[len(points)], error.message))
    if points and points[-1].void is not None:
        reason = f"spared, since {points[-1].label} was void"
        points += [_void(point, reason) for point in workload.points[len(points) :]]
    return Run(peer.name, workload.name, repeat, identity, tuple(points))


async def _point(
    engine: Engine,
    workload: Workload,
    point: Point,
    repeat: int,
    settings: _Settings,
    ended: Callable[[], None],
) -> PointResult:
    """Measure one point. Where it is void the engine may still be at its turns, so that no other can
    follow."""
    load, longest = point.load, engine.identity.positions
    if longest is not None and load.positions > longest:
        return _void(point, f"the engine takes {longest} positions, and this is {load.positions}")
    name = f"{workload.name}-{point.size}-{repeat}"
    try:
        async with asyncio.timeout(settings.limit):
            records = await driver.drive(engine, load, name, settings.seed, settings.vocab_size, ended)
        found = measure(records, load, workload.rate, engine.memory())
        await engine.forget(driver.names(load, name))
    except TimeoutError:
        return _void(point, f"it was not finished after {settings.limit:.0f} s")
    except (LoadError, EngineError) as error:
        return _void(point, error.message)
    except Void as reason:
        return PointResult(point.label, point.size, None, _short(str(reason)), _turns(records))
    return PointResult(point.label, point.size, found, None, _turns(records))


def _void(point: Point, reason: str) -> PointResult:
    return PointResult(point.label, point.size, None, _short(reason))


def _short(reason: str) -> str:
    return textwrap.shorten(reason, _REASON, placeholder=" ...")


def _turns(records: Sequence[Record]) -> list[dict[str, object]]:
    return [
        {
            "session": record.session,
            "turn": record.turn,
            "sent": record.sent,
            "ended": record.ended,
            "ttft": record.ttft,
            "tokens": record.tokens,
        }
        for record in records
    ]
