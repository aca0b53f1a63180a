"""How much is different after a session's cache came back from a compressed snapshot: `make bench-snapshots`.

Each segment of WikiText-2 is a session's history, whose cache is written and read back as snapshots of all
kinds. Behind each the same text follows, in turns, and its likelihood is taken; and the first of these turns
is answered greedily. Exact snapshots are the reference: what comes back from them is equal to what was.
Prints a table (stderr) and a JSON object (stdout).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy

from apiary_bench.quality import data
from apiary_bench.quality.forward import Pass
from apiary_bench.quality.statistics import Estimate, difference, mean
from apiary_server.engine.request import Text
from apiary_server.model.catalog import resolve
from apiary_server.model.loader import LoadedModel, load
from apiary_server.model.runner import Piece, Runner
from apiary_server.sessions.compression import Bits, Compression, expand
from apiary_server.sessions.pool import Lease, SlotClass, SlotLayout
from apiary_server.sessions.snapshot import Image, Origin, decode, encode, fill
from apiary_server.threads import alone, apart
from buzz import Cache, CacheState, Policy, parse

T = TypeVar("T")
KINDS: tuple[Bits | None, ...] = (None, 4, 2)
ORIGIN = Origin("", "")
STEP = 256  # tokens of a history's forward passes


@dataclass(slots=True)
class Found:
    """What followed snapshots of one kind, one element for each segment.

    Attributes:
        sizes: bytes of the snapshot.
        writes: seconds of one processor that it took to make, without the disk.
        reads: seconds of one processor to check and expand it.
        losses: mean negative log-likelihood of the text that follows, in nats.
        tops: the likeliest next token at each place of that text.
        answers: greedy tokens behind the first turn of it.
    """

    sizes: list[int] = field(default_factory=list)
    writes: list[float] = field(default_factory=list)
    reads: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    tops: list[list[int]] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Row:
    """Snapshots of a policy and a kind beside exact ones: means over the segments, medians of
    milliseconds; of answers, the tokens before the first other one, and the share that has none."""

    policy: str
    bits: int | None
    mebibytes: float
    smaller: float
    write_ms: float
    read_ms: float
    loss: float
    more_loss: Estimate
    agreement: float
    same_tokens: float
    same_answers: float


class Sessions:
    """Caches of one policy, one after the other."""

    def __init__(self, loaded: LoadedModel, policy: Policy, history: int) -> None:
        self.policy = policy
        self._loaded, self._runner = loaded, Runner(loaded.backend)
        self._layout = SlotLayout.of(loaded.geometry, policy, slack=64)
        self._slot = _place(self._layout)
        self._workspace = _place(SlotLayout.of_workspace(loaded.geometry, history))

    def image(self, history: list[int]) -> Image:
        """The cache behind a history, which is one prompt."""
        cache = Cache(self.policy, self._loaded.rotary, self._workspace.buffers(self.policy.states))
        cache.begin_segment(len(history))
        for start in range(0, len(history), STEP):
            self._runner.run([Piece(history[start : start + STEP], cache, self._workspace, logits=False)])
        cache.end_segment(self._slot.buffers(self.policy.states))
        slot = self._slot.memory.clone()
        return Image(str(self.policy), 1, 0, "", self._layout, cache.state(), slot)

    def follow(
        self, image: Image, bits: Bits | None, text: list[int], turn: int, answer: int, to: Found
    ) -> None:
        """Note what follows a snapshot of the image."""
        compression = None if bits is None else Compression(bits, self._loaded.rotary)
        parts, seconds = _timed(lambda: encode(image, ORIGIN, compression=compression))
        snapshot = b"".join(parts)
        to.sizes.append(len(snapshot))
        to.writes.append(seconds)
        (state, tensors), seconds = _timed(lambda: self._decoded(snapshot))
        to.reads.append(seconds)
        cache, fed = self._restored(state, tensors), text[:-1]
        behind = torch.cat(
            [self._read(cache, fed[start : start + turn]) for start in range(0, len(fed), turn)]
        )
        to.losses.append(float(cross_entropy(behind, torch.tensor(text[1:]))))
        to.tops.append(behind.argmax(dim=-1).tolist())
        cache = self._restored(state, tensors)
        tokens = [int(self._read(cache, text[:turn])[-1].argmax())]
        while len(tokens) < answer:
            cache.begin_segment(1)
            row = self._runner.run([Piece(tokens[-1:], cache, self._slot, logits=True)])
            cache.end_segment()
            tokens.append(int(row.argmax()))
        to.answers.append(tokens)

    def _decoded(self, snapshot: bytes) -> tuple[CacheState, Mapping[str, Tensor]]:
        manifest, tensors = decode(snapshot, ORIGIN)
        if manifest.counts is None:
            raise ValueError("a snapshot without a cache")
        if manifest.bits is None:
            return manifest.counts.state, tensors
        return expand(manifest.counts.state, tensors, self._loaded.rotary)

    def _restored(self, state: CacheState, tensors: Mapping[str, Tensor]) -> Cache:
        fill(self._slot.memory, self._layout, state, tensors)
        cache = Cache(self.policy, self._loaded.rotary, self._slot.buffers(self.policy.states))
        cache.restore(state)
        return cache

    def _read(self, cache: Cache, tokens: list[int]) -> Tensor:
        """The logits behind each token of a turn."""
        cache.begin_segment(len(tokens))
        cache.prepare(len(tokens))
        forward = Pass(self._loaded)
        first = forward.chunk(cache.live, cache, tokens, cache.states)
        logits = forward.run(range(first, first + len(tokens)))
        cache.append(len(tokens))
        cache.end_segment()
        return logits


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    """What comes of it, and seconds of the processor, in a thread such as a worker has for snapshots."""

    def timed() -> tuple[T, float]:
        alone()
        began = time.thread_time()
        return work(), time.thread_time() - began

    return apart(timed)


def _place(layout: SlotLayout) -> Lease:
    return Lease(SlotClass(layout, torch.zeros(layout.bytes, dtype=torch.uint8)), 0, lambda _: None)


def row(policy: Policy, bits: Bits | None, found: Found, exact: Found) -> Row:
    """What was found beside what follows exact snapshots."""
    losses, before = np.array(found.losses), np.array(exact.losses)
    same = [
        next((place for place, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), len(pair[0]))
        for pair in zip(found.answers, exact.answers, strict=True)
    ]
    return Row(
        policy=str(policy),
        bits=bits,
        mebibytes=float(np.mean(found.sizes)) / 2**20,
        smaller=sum(exact.sizes) / sum(found.sizes),
        write_ms=1000 * float(np.median(found.writes)),
        read_ms=1000 * float(np.median(found.reads)),
        loss=float(losses.mean()),
        more_loss=difference(losses, before, mean, seed=0),
        agreement=float((np.array(found.tops) == np.array(exact.tops)).mean()),
        same_tokens=float(np.mean(same)),
        same_answers=float(np.mean([count == len(found.answers[0]) for count in same])),
    )


def measure(
    loaded: LoadedModel, policy: Policy, tokens: list[int], arguments: argparse.Namespace
) -> list[Row]:
    """Follow snapshots of each kind behind each segment."""
    sessions = Sessions(loaded, policy, arguments.history)
    found = {bits: Found() for bits in KINDS}
    length = arguments.history + arguments.text + 1
    segments = range(0, arguments.segments * length, length)
    for start in track(segments, str(policy), console=Console(stderr=True), transient=True):
        text = tokens[start + arguments.history : start + length]
        image = sessions.image(tokens[start : start + arguments.history])
        for bits, into in found.items():
            sessions.follow(image, bits, text, arguments.turn, arguments.answer, into)
    return [row(policy, bits, each, found[None]) for bits, each in found.items()]


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description="What compressed snapshots change.")
    parser.add_argument("--data", type=Path, required=True, help="directory of wikitext2.txt")
    parser.add_argument("--model", default="smollm2-135m", help="a pulled model or a directory")
    parser.add_argument("--policies", nargs="*", default=["buzz2", "full(bound=4096)"])
    parser.add_argument("--history", type=int, default=3000, help="tokens before the snapshot")
    parser.add_argument("--text", type=int, default=256, help="tokens after it")
    parser.add_argument("--turn", type=int, default=32, help="tokens of those that come together")
    parser.add_argument("--answer", type=int, default=64, help="greedy tokens behind the first such turn")
    parser.add_argument("--segments", type=int, default=16)
    parser.add_argument("--cache-dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.cache_dtype)
    loaded = load(resolve(arguments.model), torch.device("cpu"), torch.float32, dtype)
    tokens = loaded.tokenizer.encode(Text(text=data.text(arguments.data, "wikitext2.txt")))
    if len(tokens) < arguments.segments * (arguments.history + arguments.text + 1):
        parser.error(f"the text has {len(tokens):,} tokens, too few for these segments")
    rows = []
    for spec in arguments.policies:
        policy = parse(spec).resolve(loaded.rotary.max_positions)
        rows += measure(loaded, policy, tokens, arguments)
    table = Table(
        "policy",
        "bits",
        "MiB",
        "smaller",
        "write ms",
        "read ms",
        "loss",
        "more loss",
        "same top",
        "same tokens",
        "same answers",
    )
    for each in rows:
        more = each.more_loss
        table.add_row(
            each.policy,
            str(each.bits or "exact"),
            f"{each.mebibytes:.1f}",
            f"{each.smaller:.1f}x",
            f"{each.write_ms:.1f}",
            f"{each.read_ms:.1f}",
            f"{each.loss:.4f}",
            f"{more.value:+.4f} [{more.low:+.4f}, {more.high:+.4f}]",
            f"{each.agreement:.1%}",
            f"{each.same_tokens:.1f} of {arguments.answer}",
            f"{each.same_answers:.0%}",
        )
    Console(stderr=True, width=140).print(table)
    json.dump([asdict(each) for each in rows], sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
