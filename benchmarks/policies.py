"""What a policy's work costs of a decode step: `make bench-policies`.

Each policy is scaled to hold equally many entries on average. Some sessions lie at rest in neighbouring slots
and decode together, as in a worker, for whole compaction periods. A step is one forward pass, in which
attention records what the policy asks for, and the end of each session's segment: compaction, rotation,
quantisation. The policies take turns, a period each, so that all see the same machine. `window` records
nothing and its attention is fused: what others take longer is their work. Prints a table (stderr) and a JSON
object (stdout).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from apiary_bench.quality.memory import Segment
from apiary_bench.quality.sizing import fit
from apiary_server.model.catalog import resolve
from apiary_server.model.loader import LoadedModel, load
from apiary_server.model.runner import Piece, Runner
from apiary_server.sessions.pool import Lease, SlotClass, SlotLayout
from buzz import Cache, Policy, names, parse

BASELINE = "window"


@dataclass(frozen=True, slots=True)
class Row:
    """One policy as it ran, milliseconds of a step, and the share of it that the baseline does not need."""

    policy: str
    entries: float
    forward_ms: float
    settle_ms: float
    step_ms: float
    work: float


class Sessions:
    """Sessions of one policy, in slots of their own memory, all at the same point of their period."""

    def __init__(self, loaded: LoadedModel, policy: Policy, count: int) -> None:
        self.policy = policy
        self._runner = Runner(loaded.model)
        layout = SlotLayout.of(loaded.geometry, policy, slack=64)
        slots = SlotClass(layout, torch.zeros(count * layout.bytes, dtype=torch.uint8))
        self._places = [Lease(slots, i, lambda _: None) for i in range(count)]
        self._caches = [Cache(policy, loaded.rotary, place.buffers(policy.states)) for place in self._places]
        first = self._caches[0]
        room = SlotLayout.of_workspace(loaded.geometry, 2 * policy.bound)
        workspace = SlotClass(room, torch.zeros(room.bytes, dtype=torch.uint8))
        first.copy_to(workspace.buffers(0, policy.states))
        tokens = [1000 + i * 7919 % 40_000 for i in range(policy.bound + 1)]
        first.begin_segment(len(tokens))
        self._runner.run([Piece(tokens, first, Lease(workspace, 0, lambda _: None), logits=False)])
        first.end_segment(self._places[0].buffers(policy.states))
        for cache, place in zip(self._caches[1:], self._places[1:], strict=True):
            place.memory.copy_(self._places[0].memory)
            cache.restore(first.state())

    def period(self) -> tuple[list[float], list[float], list[float]]:
        """Decode until all have compacted once; seconds of each forward pass and of what follows it, and
        entries."""
        forwards: list[float] = []
        settles: list[float] = []
        entries: list[float] = []
        evicted = self._caches[0].evicted
        while self._caches[0].evicted == evicted:
            began = time.perf_counter()
            for cache in self._caches:
                cache.begin_segment(1)
            pieces = zip(self._caches, self._places, strict=True)
            self._runner.run([Piece([17], cache, place, logits=True) for cache, place in pieces])
            ran = time.perf_counter()
            for cache in self._caches:
                cache.end_segment()
            forwards.append(ran - began)
            settles.append(time.perf_counter() - ran)
            entries.append(self._caches[0].n)
        return forwards, settles, entries


def equal(policy: Policy, entries: int, loaded: LoadedModel) -> Policy:
    """The policy with the bound at which it holds `entries` on average while it decodes."""
    most = loaded.rotary.max_positions - 1
    trace = (Segment(2 * entries, 0), *[Segment(1, 1)] * (4 * entries))
    return fit(policy, trace, entries, loaded.geometry, most, "entries").policy


def measure(loaded: LoadedModel, policies: list[Policy], count: int, periods: int) -> list[Row]:
    """Time each policy over `periods` compaction periods."""
    console = Console(stderr=True)
    filled = track(policies, "filling caches", console=console, transient=True)
    sessions = [Sessions(loaded, policy, count) for policy in filled]
    forwards: dict[Policy, list[float]] = {policy: [] for policy in policies}
    settles: dict[Policy, list[float]] = {policy: [] for policy in policies}
    entries: dict[Policy, list[float]] = {policy: [] for policy in policies}
    for number in track(range(periods + 1), "decoding", console=console, transient=True):
        for each in sessions:
            timed = each.period()
            if number:  # the first one warms up
                for kept, new in zip((forwards, settles, entries), timed, strict=True):
                    kept[each.policy] += new
    steps = {
        policy: statistics.median(forwards[policy]) + statistics.mean(settles[policy]) for policy in policies
    }
    return [
        Row(
            str(policy),
            statistics.mean(entries[policy]),
            1000 * statistics.median(forwards[policy]),
            1000 * statistics.mean(settles[policy]),
            1000 * steps[policy],
            1 - steps[policies[0]] / steps[policy],
        )
        for policy in policies
    ]


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description="What a policy's work costs of a decode step.")
    parser.add_argument("--model", default="smollm2-135m", help="a pulled model or a directory")
    parser.add_argument("--sessions", type=int, default=16, help="that decode together")
    parser.add_argument("--entries", type=int, default=564, help="held on average")
    parser.add_argument("--periods", type=int, default=2, help="compaction periods to measure")
    parser.add_argument("--policies", nargs="*", help="beside window; default: all that evict")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    specs = arguments.policies or [name for name in names() if name not in {BASELINE, "full"}]
    loaded = load(resolve(arguments.model), torch.device("cpu"), torch.float32, torch.float32)
    policies = [equal(parse(spec), arguments.entries, loaded) for spec in [BASELINE, *specs]]
    rows = measure(loaded, policies, arguments.sessions, arguments.periods)
    table = Table("policy", "entries", "forward ms", "settle ms", "step ms", "policy work")
    for row in rows:
        table.add_row(
            row.policy,
            f"{row.entries:.0f}",
            f"{row.forward_ms:.1f}",
            f"{row.settle_ms:.1f}",
            f"{row.step_ms:.1f}",
            f"{row.work:.1%}",
        )
    Console(stderr=True).print(table)
    json.dump([asdict(row) for row in rows], sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
