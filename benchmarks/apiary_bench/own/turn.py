"""A measured turn of a session, and what it found there."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from time import perf_counter

from apiary_bench.errors import LoadError, VoidError
from apiary_bench.serving.workload import vocabulary
from apiary_client import Model, Stopping, aio


@dataclass(frozen=True, slots=True, kw_only=True)
class First:
    """A turn's first token.

    Attributes:
        seconds: from the request to it, for the client.
        cached_tokens: that were not computed.
        rebuild_reason: why any were computed again; None: none were.
    """

    seconds: float
    cached_tokens: int
    rebuild_reason: str | None


def draw(model: Model, seed: str, count: int) -> Sequence[int]:
    """So many tokens of input, the same for the same seed."""
    return random.Random(seed).choices(vocabulary(model), k=count)  # noqa: S311 - repeatable, not secret


async def take(
    client: aio.Client, session: str, ids: Sequence[int], output: int = 1
) -> tuple[First, Sequence[int]]:
    """Take a session's next turn, and answer it greedily by `output` tokens.

    Returns:
        When the first one came, and all of them.

    Raises:
        ApiaryError: the call failed.
        LoadError: the answer ended too early.
    """
    stopping = Stopping(max_tokens=output, ignore_eos=True)
    came, usage, tokens = None, None, list[int]()
    sent = perf_counter()
    async with aclosing(client.stream(token_ids=ids, session=session, stopping=stopping)) as stream:
        async for delta in stream:
            if delta.token_ids and came is None:
                came = perf_counter()
            tokens += delta.token_ids
            usage = delta.usage
    if came is None or usage is None or len(tokens) < output:
        raise LoadError(f"an answer ended after {len(tokens)} of {output} tokens")
    first = First(seconds=came - sent, cached_tokens=usage.cached_tokens, rebuild_reason=usage.rebuild_reason)
    return first, tokens


def cached(first: First, least: int, where: str) -> First:
    """Check that a turn found its session's cache, of so many tokens at least.

    Args:
        first: what it says of itself.
        least: tokens.
        where: in the error, after "a turn".

    Raises:
        VoidError: it did not.
    """
    if first.rebuild_reason is not None or first.cached_tokens < least:
        raise VoidError(
            f"a turn {where} found {first.cached_tokens:,} tokens in its session's cache, and at least "
            f"{least:,} should be there (rebuild_reason: {first.rebuild_reason or 'none'})"
        )
    return first
