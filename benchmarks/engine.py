"""Tokens per second of the bare engine, without gRPC: `make bench`.

For each number of sessions: every session gets a prompt of the same length, then all decode together. Prefill is
prompt tokens by the time until the last session has its first token; decode is the tokens after that by their
time. Prints a table (stderr) and one JSON object (stdout).
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


async def measure(engine: Engine, sessions: int, prompt: int, output: int) -> Row:
    """Run `sessions` one-shot turns at once."""
    vocabulary = engine.model.vocab_size
    firsts: list[float] = []

    async def one(number: int) -> None:
        ids = tuple((number * 7919 + place * 31) % vocabulary for place in range(prompt))
        stopping = Stopping(max_tokens=output, ignore_eos=True)
        stream = TokenStream(asyncio.get_running_loop(), capacity=output + 1, stall_limit=600)
        engine.open(TurnRequest(input=TokenIds(ids=ids), stopping=stopping), stream)
        received = 0
        async for delta in stream:
            if not received:
                firsts.append(time.perf_counter())
            received += len(delta.token_ids)
        if received != output:
            raise RuntimeError(f"{received} tokens came, not {output}: the row would be void")

    began = time.perf_counter()
    await asyncio.gather(*(one(number) for number in range(sessions)))
    ended = time.perf_counter()
    prefill, decode = max(firsts) - began, ended - max(firsts)
    return Row(
        sessions,
        prompt,
        output,
        sessions * prompt / prefill,
        sessions * (output - 1) / decode,
        1000 * decode / (output - 1),
        engine.capacity().peak_bytes,
    )


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--policy", default="buzz")
    parser.add_argument("--sessions", default="1,4,16", help="comma-separated numbers of sessions")
    parser.add_argument("--prompt", type=int, default=600, help="prompt tokens of each session")
    parser.add_argument("--output", type=int, default=64, help="tokens that each session generates")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 lets torch choose")
    parser.add_argument("--step-tokens", type=int, default=256)
    arguments = parser.parse_args()
    engine = build(
        Settings.load(
            model=arguments.model,
            policy=arguments.policy,
            threads=arguments.threads,
            step_tokens=arguments.step_tokens,
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
