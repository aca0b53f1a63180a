"""Tokens per second of the bare engine, without gRPC: `make bench`.

For each number of sessions two turns are timed. In the first every session takes a prompt and answers one
token: prefill. In the second every session takes one token and answers many, all in the same steps: decode,
counted from the last session's first token to the end. Prints a table (stderr) and a JSON object (stdout).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from apiary_server.engine.delivery import TokenStream
from apiary_server.engine.engine import Engine
from apiary_server.engine.request import Stopping, TokenIds, TurnRequest
from apiary_server.settings import Settings
from apiary_server.worker import build


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement. Tokens per second of all sessions together; milliseconds per decode step."""

    sessions: int
    prompt: int
    output: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    step_ms: float
    peak_bytes: int


async def turn(engine: Engine, session: str, ids: tuple[int, ...], output: int) -> tuple[float, float]:
    """Run one turn; returns when its first and its last token came."""
    stopping = Stopping(max_tokens=output, ignore_eos=True)
    stream = TokenStream(asyncio.get_running_loop(), capacity=output + 1, stall_limit=600)
    engine.open(TurnRequest(input=TokenIds(ids=ids), session=session, stopping=stopping), stream)
    times = [time.perf_counter() async for delta in stream if delta.token_ids]
    return times[0], times[-1]


async def measure(engine: Engine, sessions: int, prompt: int, output: int) -> Row:
    """Time `sessions` sessions that prefill together and decode together."""
    vocabulary = engine.model.vocab_size
    names = [engine.sessions.create("default", None, None, None, None, {}).id for _ in range(sessions)]
    prompts = [
        tuple((number * 7919 + place * 31) % vocabulary for place in range(prompt))
        for number in range(sessions)
    ]
    began = time.perf_counter()
    ends = await asyncio.gather(*(turn(engine, *each, 1) for each in zip(names, prompts, strict=True)))
    prefill = max(last for _, last in ends) - began
    ends = await asyncio.gather(*(turn(engine, name, (50,), output) for name in names))
    decode = max(last for _, last in ends) - max(first for first, _ in ends)
    peak = engine.capacity().peak_bytes
    for name in names:
        engine.delete_session("default", name).result()
    tokens = sessions * (output - 1)
    return Row(
        sessions,
        prompt,
        output,
        sessions * prompt / prefill,
        tokens / decode,
        1000 * decode / (output - 1),
        peak,
    )


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--policy", default="buzz2")
    parser.add_argument("--sessions", default="1,4,16", help="comma-separated numbers of sessions")
    parser.add_argument("--prompt", type=int, default=600, help="prompt tokens of each session")
    parser.add_argument("--output", type=int, default=64, help="tokens that each session generates")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 lets torch choose")
    parser.add_argument("--step-tokens", type=int, default=256)
    parser.add_argument(
        "--cache-budget", default="2GiB", help="two slots for each session, so that none waits"
    )
    arguments = parser.parse_args()
    engine = build(
        Settings.load(
            model=arguments.model,
            policy=arguments.policy,
            threads=arguments.threads,
            step_tokens=arguments.step_tokens,
            cache_budget=arguments.cache_budget,
        )
    )
    engine.start()
    console = Console(stderr=True)
    counts = [int(count) for count in arguments.sessions.split(",")]
    rows = []
    with Progress(console=console) as progress:
        task = progress.add_task("measuring", total=len(counts) + 1)
        asyncio.run(measure(engine, 1, 32, 8))  # warm up
        progress.advance(task)
        for count in counts:
            rows.append(asyncio.run(measure(engine, count, arguments.prompt, arguments.output)))
            progress.advance(task)
    engine.stop(grace=0)
    title = f"{arguments.model}, {arguments.policy}, float32, {arguments.prompt} in, {arguments.output} out"
    table = Table("sessions", "prefill tokens/s", "decode tokens/s", "ms per step", title=title)
    for row in rows:
        figures = (row.prefill_tokens_per_second, row.decode_tokens_per_second, row.step_ms)
        table.add_row(str(row.sessions), *(f"{figure:.1f}" for figure in figures))
    console.print(table)
    json.dump({"arguments": vars(arguments), "rows": [asdict(row) for row in rows]}, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
