"""What a policy's work costs of a decode step: `make bench-policies`.

Each policy is scaled to hold equally many entries on average. Some sessions lie at rest in neighbouring slots
and decode together, as in a worker. A step is one forward pass, in which attention records what the policy
asks for, and the end of each session's segment: compaction, rotation, quantisation. In each round every
policy takes one step, in random order, and is compared with `window` in the same round: that records nothing
and its attention is fused, so what others take longer is their work. Prints a table (stderr) and a JSON
object (stdout).
"""

from __future__ import annotations

import argparse
import json
import operator
import random
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
WARMUP = 4


@dataclass(frozen=True, slots=True)
class Row:
    """One policy as it ran: medians of milliseconds, the mean of what follows a forward pass (compactions are
    rare), and the share of a step that the baseline does not need."""

    policy: str
    entries: float
    forward_ms: float
    settle_ms: float
    step_ms: float
    work: float


class Sessions:
    """Sessions of one policy in neighbouring slots, all alike."""

    def __init__(self, loaded: LoadedModel, policy: Policy, count: int) -> None:
        self.policy = policy
        self.forwards: list[float] = []
        self.settles: list[float] = []
        self.entries: list[int] = []
        self._runner = Runner(loaded.backend)
        layout = SlotLayout.of(loaded.geometry, policy, slack=64)
        slots = SlotClass(layout, torch.zeros(count * layout.bytes, dtype=torch.uint8))
        self._places = [Lease(slots, i, lambda _: None) for i in range(count)]
        self._caches = [Cache(policy, loaded.rotary, place.buffers(policy.states)) for place in self._places]
        first, place = self._caches[0], self._places[0]
        room = SlotLayout.of_workspace(loaded.geometry, 2 * policy.bound)
        workspace = SlotClass(room, torch.zeros(room.bytes, dtype=torch.uint8))
        first.copy_to(workspace.buffers(0, policy.states))
        tokens = [1000 + i * 7919 % 40_000 for i in range(policy.bound + 1)]
        first.begin_segment(len(tokens))
        self._runner.run([Piece(tokens, first, Lease(workspace, 0, lambda _: None), logits=False)])
        first.end_segment(place.buffers(policy.states))
        for cache, other in zip(self._caches[1:], self._places[1:], strict=True):
            other.memory.copy_(place.memory)
            cache.restore(first.state())

    def step(self) -> None:
        """Decode a token in each, and note the seconds."""
        began = time.perf_counter()
        for cache in self._caches:
            cache.begin_segment(1)
        pairs = zip(self._caches, self._places, strict=True)
        self._runner.run([Piece([17], cache, place, logits=True) for cache, place in pairs])
        ran = time.perf_counter()
        for cache in self._caches:
            cache.end_segment()
        self.forwards.append(ran - began)
        self.settles.append(time.perf_counter() - ran)
        self.entries.append(self._caches[0].n)

    def forget(self) -> None:
        """Drop what was noted."""
        self.forwards, self.settles, self.entries = [], [], []

    def row(self, baseline: Sessions) -> Row:
        """What was noted, beside the baseline's."""
        forward, settle = statistics.median(self.forwards), statistics.mean(self.settles)
        paired = map(operator.sub, self.forwards, baseline.forwards)
        work = statistics.median(paired) + settle - statistics.mean(baseline.settles)
        step = forward + settle
        return Row(
            str(self.policy),
            statistics.mean(self.entries),
            1000 * forward,
            1000 * settle,
            1000 * step,
            work / step,
        )


def equal(policy: Policy, entries: int, loaded: LoadedModel) -> Policy:
    """The policy with the bound at which it holds `entries` on average while it decodes."""
    most = loaded.rotary.max_positions - 1
    trace = (Segment(2 * entries, 0), *[Segment(1, 1)] * (4 * entries))
    return fit(policy, trace, entries, loaded.geometry, most, "entries").policy


def measure(loaded: LoadedModel, policies: list[Policy], count: int, rounds: int) -> list[Row]:
    """Time each policy over `rounds` steps, after some to warm up."""
    console = Console(stderr=True)
    filled = track(policies, "filling caches", console=console, transient=True)
    sessions = [Sessions(loaded, policy, count) for policy in filled]
    order = random.Random(0)  # noqa: S311, nothing secret
    for number in track(range(WARMUP + rounds), "decoding", console=console, transient=True):
        if number == WARMUP:
            for each in sessions:
                each.forget()
        for each in order.sample(sessions, len(sessions)):
            each.step()
    return [each.row(sessions[0]) for each in sessions]


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description="What a policy's work costs of a decode step.")
    parser.add_argument("--model", default="smollm2-135m", help="a pulled model or a directory")
    parser.add_argument("--sessions", type=int, default=16, help="that decode together")
    parser.add_argument("--entries", type=int, default=564, help="held on average")
    parser.add_argument(
        "--rounds", type=int, default=128, help="steps of each; whole compaction periods are best"
    )
    parser.add_argument("--policies", nargs="*", help="beside window; default: all that evict")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    specs = arguments.policies or [name for name in names() if name not in {BASELINE, "full"}]
    loaded = load(resolve(arguments.model), torch.device("cpu"), torch.float32, torch.float32)
    policies = [equal(parse(spec), arguments.entries, loaded) for spec in [BASELINE, *specs]]
    rows = measure(loaded, policies, arguments.sessions, arguments.rounds)
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
