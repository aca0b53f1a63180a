"""What operators see of a worker: metrics to scrape, and logs without a word of anybody's prompt."""

from __future__ import annotations

import json
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from apiary_client import Client, errors

from .reading import Reader, tokens
from .worker import Worker, settled

MARKER = "xylophone-marmalade-7361"


def _scrape(worker: Worker) -> dict[str, float]:
    """The samples by name, summed over their attributes; histograms by `_count` and `_sum`."""
    with urllib.request.urlopen(f"http://127.0.0.1:{worker.metrics_port}/metrics", timeout=20) as response:
        text = response.read().decode()
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values[sample.name] = values.get(sample.name, 0.0) + sample.value
    return values


def test_prometheus(worker: Worker, client: Client) -> None:
    before = _scrape(worker)
    client.create_session("seen")
    for _ in range(3):
        client.generate("Hello.", session="seen", stopping=tokens(30), timeout=30)
    running = Reader(client.stream("Go on.", session="seen", stopping=tokens(30_000), timeout=1.0))
    assert running.begun.wait(30)
    during = _scrape(worker)
    capacity = client.get_capacity()
    assert isinstance(running.end().error, errors.DeadlineExceeded)
    settled(client, "seen")
    after = _scrape(worker)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grown("gen_ai_server_request_duration_seconds_count") == 4
    assert grown("gen_ai_server_time_to_first_token_seconds_count") == 3
    assert grown("gen_ai_server_time_per_output_token_seconds_count") == 3
    assert grown("gen_ai_server_request_duration_seconds_sum") > 0.9
    assert grown("apiary_tokens_total") > 90
    assert grown("apiary_compactions_total") > 3
    assert grown("apiary_evicted_entries_total") > 60
    assert grown("apiary_step_duration_seconds_count") > 90
    assert during["apiary_pool_budget_bytes"] == capacity.budget_bytes
    assert during["apiary_pool_used_bytes"] > capacity.workspace_bytes
    assert during["apiary_turns_running"] == 1
    assert (after["apiary_turns_running"], after["apiary_turns_queued"]) == (0, 0)
    assert (after["apiary_sessions"], after["apiary_sessions_resident"]) == (1, 1)


def test_logs_hold_no_prompts(worker: Worker, client: Client) -> None:
    answer = client.generate(f"Remember {MARKER}.", stopping=tokens(60), timeout=30)
    client.create_session("secret")
    client.generate(MARKER, session="secret", stopping=tokens(8), timeout=30)
    failing = (
        ({"messages": MARKER, "policy": "nonsense"}, errors.InvalidField),
        ({"messages": MARKER, "session": "unknown"}, errors.SessionNotFound),
        ({"text": MARKER, "policy": "full(bound=16)"}, errors.ContextFull),
        ({"text": f"{MARKER} " * 8000}, errors.InvalidField),  # longer than a turn may be
        ({"messages": MARKER, "stopping": tokens(30_000), "timeout": 0.2}, errors.DeadlineExceeded),
        ({"text": MARKER, "request_id": MARKER}, errors.InvalidField),
    )
    for arguments, kind in failing:
        with pytest.raises(kind) as caught:
            client.generate(**{"timeout": 30, **arguments})  # type: ignore[arg-type]
        assert MARKER not in caught.value.message
    cancelled = client.stream(f"{MARKER}, again", stopping=tokens(30_000), timeout=30)
    next(cancelled)
    cancelled.close()
    logs = worker.stderr
    assert "metrics can be scraped" in logs, "nothing was logged at all"
    assert MARKER not in logs
    assert MARKER.encode("unicode_escape").decode() not in logs
    assert str(list(answer.token_ids[:8]))[1:-1] not in logs
    for line in logs.splitlines():
        if not line.startswith("apiary: "):
            assert json.loads(line)["level"] in {"info", "warning"}, line
    assert MARKER not in str(_scrape(worker))
