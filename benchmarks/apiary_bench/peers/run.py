"""Runs workloads on engines: one engine at a time, and with every repeat in the other order."""

from __future__ import annotations

import asyncio
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from apiary_bench.errors import LoadError
from apiary_bench.peers import driver
from apiary_bench.peers.engine import Engine, EngineError, Identity, Peer
from apiary_bench.peers.measures import Void, measure
from apiary_bench.peers.results import PointResult, Results, Run
from apiary_bench.peers.workload import Point, Workload
from apiary_bench.progress import Observer
from apiary_bench.serving.record import Record

_REASON = 300  # characters of why a point is void


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What all runs have in common.

    Attributes:
        repeats: how often everything is measured.
        seed: of the tokens.
        vocab_size: of the model.
        limit: seconds that a point may take, its history included; a point that takes longer is void, and its
            engine is spared the workload's next points.
    """

    repeats: int
    seed: int
    vocab_size: int
    limit: float


async def run(
    peers: Sequence[Peer],
    workloads: Sequence[Workload],
    settings: Settings,
    results: Results,
    observe: Observer,
    keep: Callable[[Results], None],
) -> None:
    """Measure everything that `results` does not have, and add it there.

    Args:
        peers: engines to start.
        workloads: what to give them.
        settings: how.
        results: takes the runs.
        observe: hears of every turn that ended.
        keep: is called with the results after every run.
    """
    for repeat, workload, peer in plan(peers, workloads, settings.repeats):
        stage, total = f"{workload.name}: {peer.name}", workload.turns * settings.repeats
        observe(stage, workload.turns * repeat, total)
        if not results.done(peer.name, workload.name, repeat):
            ended = _counting(observe, stage, workload.turns * repeat, total)
            results.runs.append(await _measure(peer, workload, repeat, settings, ended))
            keep(results)
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


def _counting(observe: Observer, stage: str, before: int, total: int) -> Callable[[], None]:
    """To be called at the end of each turn."""
    done = count(before + 1)
    return lambda: observe(stage, next(done), total)


async def _measure(
    peer: Peer, workload: Workload, repeat: int, settings: Settings, ended: Callable[[], None]
) -> Run:
    """Start an engine and measure all points: those after a void one are void, too, since the engine may
    still be at its turns, and so are those that it has no positions for."""
    identity: Identity | None = None
    found: dict[Point, PointResult] = {}
    reason = "it was not measured"
    try:
        async with peer.start(workload) as engine:
            identity = engine.identity
            for point in workload.points:
                longest, needed = identity.positions, point.load.positions
                if longest is not None and needed > longest:
                    found[point] = _void(point, f"the engine takes {longest} positions, not {needed}")
                    continue
                found[point] = await _point(engine, workload, point, repeat, settings, ended)
                if found[point].measures is None:
                    reason = f"spared, since {point.label} was void"
                    break
    except EngineError as error:
        reason = error.message
    points = tuple(found.get(point) or _void(point, reason) for point in workload.points)
    return Run(peer.name, workload.name, repeat, identity, points)


async def _point(
    engine: Engine,
    workload: Workload,
    point: Point,
    repeat: int,
    settings: Settings,
    ended: Callable[[], None],
) -> PointResult:
    load, name = point.load, f"{workload.name}-{point.size}-{repeat}"
    records: list[Record] = []
    try:
        async with asyncio.timeout(settings.limit):
            records = await driver.drive(engine, load, name, settings.seed, settings.vocab_size, ended)
        measures = measure(records, load, workload.rate, engine.memory())
        await engine.forget(driver.names(load, name))
    except TimeoutError:
        return _void(point, f"it was not finished after {settings.limit:.0f} s")
    except (LoadError, EngineError, Void) as error:
        return _void(point, str(error), records)
    return PointResult(point.label, point.size, measures, None, _turns(records))


def _void(point: Point, reason: str, records: Sequence[Record] = ()) -> PointResult:
    short = textwrap.shorten(reason, _REASON, placeholder=" ...")
    return PointResult(point.label, point.size, None, short, _turns(records))


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
