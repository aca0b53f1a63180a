"""What was measured: one JSON file, rewritten after every run, so that what was stopped can go on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from apiary_bench import document
from apiary_bench.errors import BenchError
from apiary_bench.peers.engine import Identity
from apiary_bench.peers.measures import Measures, medians

_VERSIONS = ("apiary", "torch")


@dataclass(frozen=True, slots=True)
class PointResult:
    """One point of a run: its measures, or why it is void. `turns` are the measured ones: session, turn,
    sent, ended, time to first token, tokens."""

    label: str
    size: int
    measures: Measures | None
    void: str | None = None
    turns: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, slots=True)
class Run:
    """One start of one engine for one workload. An engine that did not start has no identity."""

    peer: str
    workload: str
    repeat: int
    identity: Identity | None
    points: tuple[PointResult, ...]

    @property
    def void(self) -> bool:
        """Whether nothing of it counts."""
        return all(point.measures is None for point in self.points)


@dataclass(frozen=True, slots=True)
class Row:
    """A point of an engine over all repeats: the medians, or why it is void."""

    peer: str
    identity: Identity | None
    label: str
    size: int
    repeats: int
    measures: Measures | None
    void: str | None


@dataclass(slots=True)
class Results:
    """All runs.

    Attributes:
        arguments: what they have in common; runs of others are not continued.
        runs: as they were made.
    """

    arguments: Mapping[str, Any]
    runs: list[Run] = field(default_factory=list)

    def done(self, peer: str, workload: str, repeat: int) -> bool:
        """Whether there is such a run, and something of it counts."""
        return any((run.peer, run.workload, run.repeat) == (peer, workload, repeat) for run in self.runs)

    def rows(self, workload: str) -> Iterator[Row]:
        """Of a workload: by point, then in the order in which engines first came.

        A row is void if any repeat is: it has the first one's reason.
        """
        found: dict[tuple[int, str], dict[str, list[tuple[Run, PointResult]]]] = {}
        for run in self.runs:
            for point in run.points:
                if run.workload == workload:
                    peers = found.setdefault((point.size, point.label), {})
                    peers.setdefault(run.peer, []).append((run, point))
        for (size, label), peers in sorted(found.items()):
            for peer, repeats in sorted(peers.items(), key=lambda item: self._order(item[0])):
                measures = [point.measures for _, point in repeats if point.measures is not None]
                identities = [run.identity for run, _ in repeats if run.identity is not None]
                yield Row(
                    peer,
                    identities[0] if identities else None,
                    label,
                    size,
                    len(repeats),
                    medians(measures) if len(measures) == len(repeats) else None,
                    next((point.void for _, point in repeats if point.void is not None), None),
                )

    def _order(self, peer: str) -> int:
        peers: Sequence[str] = self.arguments["peers"]
        return peers.index(peer)

    def content(self) -> dict[str, Any]:
        """For a file."""
        return {
            **document.provenance(*_VERSIONS),
            "arguments": dict(self.arguments),
            "runs": [asdict(run) for run in self.runs],
        }

    @classmethod
    def read(cls, path: Path, arguments: Mapping[str, Any]) -> Self:
        """Those of a file of which something counts, to go on with.

        Raises:
            BenchError: the file cannot be read, is no such file, or was made with other arguments.
        """
        try:
            content = json.loads(path.read_text())
            made, runs = content["arguments"], [_run(each) for each in content["runs"]]
        except OSError as error:
            raise BenchError(f"{path} cannot be read: {error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise BenchError(f"{path} was not written by `apiary bench peers`: name another file") from error
        differing = [name for name in arguments if name != "peers" and made.get(name) != arguments[name]]
        if differing:
            raise BenchError(f"{path} was made with another {', '.join(differing)}: name another file")
        known = {"peers": list(dict.fromkeys([*made["peers"], *arguments["peers"]]))}
        return cls({**arguments, **known}, [run for run in runs if not run.void])


def _run(content: dict[str, Any]) -> Run:
    identity = None if content["identity"] is None else Identity(**content["identity"])
    return Run(**{**content, "identity": identity, "points": tuple(map(_point, content["points"]))})


def _point(content: dict[str, Any]) -> PointResult:
    measures = None if content["measures"] is None else Measures(**content["measures"])
    return PointResult(**{**content, "measures": measures, "turns": tuple(content["turns"])})
