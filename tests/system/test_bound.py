"""A session's cache never outgrows its bound, nor all caches the budget, and everything comes back."""

from __future__ import annotations

import asyncio

from apiary_client import Capacity, Client, State, aio

from .reading import Reader, tokens
from .worker import Worker, empty, until

TURNS = 12


def test_twelve_turns_stay_within_the_bound(client: Client) -> None:
    sessions = [client.create_session(name, policy=policy) for name, policy in _POLICIES.items()]
    seen: list[Capacity] = []
    transcripts = dict.fromkeys(_POLICIES, 0)
    evicted = dict.fromkeys(_POLICIES, 0)
    for turn in range(1, TURNS + 1):
        readers = [
            Reader(client.stream(f"Turn {turn}: go on.", session=session, stopping=tokens(40), timeout=60))
            for session in sessions
        ]
        while any(reader.is_alive() for reader in readers):
            seen.append(client.get_capacity())
        for session, reader in zip(sessions, readers, strict=True):
            reading = reader.end()
            assert reading.error is None
            now = client.get_session(session)
            assert now.state is State.RESIDENT
            assert now.turn_count == turn
            assert 0 < now.cache.entries <= now.cache.bound
            # nothing of the history is computed again but the last token, which was not fed back
            usage = reading.usage
            assert usage.cached_tokens == max(transcripts[now.id] - 1, 0)
            assert now.token_count == transcripts[now.id] + usage.prompt_tokens + usage.completion_tokens
            transcripts[now.id] = now.token_count
            evicted[now.id] += usage.evicted_entries
        seen.append(client.get_capacity())
    assert all(capacity.used_bytes <= capacity.peak_bytes <= capacity.budget_bytes for capacity in seen)
    assert max(capacity.running_turns for capacity in seen) > 1
    for session in sessions:
        # far beyond the bound: what is not kept was evicted, and the last token waits for the next turn
        now = client.get_session(session)
        assert now.token_count > 10 * now.cache.bound
        assert now.cache.entries + evicted[now.id] == now.token_count - 1
        client.delete_session(session)
    assert until(lambda: empty(client.get_capacity()), 5), client.get_capacity()


_POLICIES = {
    "as-served": None,
    "buzz": "buzz(sink=4,window=16,threshold=24,stride=3)",
    "h2o": "h2o(heavy=16,recent=16,block=8)",
    "streaming": "streaming(sink=4,window=40)",
}


async def test_more_sessions_than_fit_take_turns(worker: Worker) -> None:
    async with aio.Client(worker.target) as client:
        before = await client.get_capacity()
        count = before.max_resident_sessions + 10

        async def talk(place: int) -> int:
            session = await client.create_session(f"s{place}")
            for _ in range(2):
                await client.generate("Hello.", session=session, stopping=tokens(2), timeout=90)
            return (await client.get_session(session)).turn_count

        talks = asyncio.gather(*map(talk, range(count)))
        seen = []
        while not talks.done():
            seen.append(await client.get_capacity())
        assert set(await talks) == {2}
        after = await client.get_capacity()
        assert after.sessions == after.resident_sessions + after.parked_sessions == count
        assert after.parked_sessions >= 10
        assert after.parked_bytes == after.parked_sessions * after.slot_bytes
        assert all(capacity.used_bytes <= capacity.budget_bytes for capacity in seen)
        assert max(capacity.used_bytes for capacity in seen) > before.budget_bytes * 0.9
        async for session in client.list_sessions(page_size=50):
            await client.delete_session(session)
        assert empty(await client.get_capacity())
