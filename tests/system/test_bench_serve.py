"""A load on a real worker, by the command in a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from apiary_client import Client

from .conftest import Run
from .worker import APIARY, POLICY, Worker, environment, until


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where the report goes."""
    return tmp_path / "serve.json"


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def test_the_counts_are_those_that_were_asked_for(apiary: Run, client: Client, out: Path) -> None:
    asked = {"--sessions": 4, "--turns": 3, "--history": 300, "--input": 16, "--output": 48, "--warmup": 1}
    flags = [str(part) for pair in asked.items() for part in pair]
    done = apiary(
        "bench", "serve", *flags, "--cancel-rate", "0.25", "--slo-ttft", "60000", "--json", str(out)
    )
    assert done.returncode == 0, done.stderr
    assert "VOID" not in done.stdout
    content = read(out)
    summary, requests = content["summary"], content["requests"]
    assert [(one["session"], one["turn"]) for one in requests] == [(s, t) for s in range(4) for t in range(3)]
    # a cancel may come too late, when its tokens came together with the last
    to_cancel = [one for one in requests if one["cancel_after"] is not None]
    cancelled = [one for one in to_cancel if one["outcome"] == "cancelled"]
    assert len(to_cancel) == 3
    assert summary["turns"] == {
        "completed": 12 - len(cancelled),
        "cancelled": len(cancelled),
        "cut_short": 0,
        "failed": 0,
    }
    assert cancelled
    assert all(one["cancel_after"] <= one["tokens"] <= 48 for one in cancelled)
    completed = [one for one in requests if one["outcome"] == "completed"]
    assert all(one["tokens"] == one["usage"]["completion_tokens"] == 48 for one in completed)
    assert all(one["usage"]["prompt_tokens"] == 16 for one in completed)
    # what was committed before is not computed again: all but the last token, which was never fed
    for session in range(4):
        kept = 301 + (16 + 48)
        for one in (one for one in completed if one["session"] == session):
            assert one["usage"]["cached_tokens"] == kept - 1
            kept += 16 + 48
    assert summary["cached_tokens"] == sum(one["usage"]["cached_tokens"] for one in completed)
    assert summary["output_tokens"] == sum(one["tokens"] for one in requests)
    assert summary["input_tokens"] == 16 * len(completed)
    assert summary["good"] == len(completed)
    for one in completed:
        assert 0 < one["ttft"] <= one["arrivals"][-1] <= one["ended"] < summary["duration"]
        assert one["arrivals"] == sorted(one["arrivals"])
        times = one["usage"]
        assert one["ttft"] > times["queue_time"] + times["prefill_time"]
    assert content["environment"]["policy"] == POLICY
    model = content["environment"]["model"]
    assert (model["weight_dtype"], model["cache_dtype"]) == ("float32", "float32")
    assert content["environment"]["capacity_before"]["budget_bytes"] == 2 * 2**20
    assert list(client.list_sessions()) == []


def test_an_open_loop_of_two_tenants(apiary: Run, worker: Worker, out: Path) -> None:
    flags = "--sessions 3 --turns 2 --output 4 --rate 20 --arrival constant --tenants 2"
    done = apiary("bench", "serve", *flags.split(), "--json", str(out))
    assert done.returncode == 0, done.stderr
    content = read(out)
    by_arrival = sorted(content["requests"], key=lambda one: one["scheduled"])
    assert [one["scheduled"] for one in by_arrival] == pytest.approx([place / 20 for place in range(6)])
    assert all(one["sent"] >= one["scheduled"] for one in by_arrival)
    assert content["summary"]["delay"]["count"] == 6
    assert content["arguments"]["tenants"] == ["bench-1", "bench-2"]
    for tenant in ("bench-1", "bench-2"):
        with worker.client(tenant) as client:
            assert list(client.list_sessions()) == []


def test_turns_that_do_not_fit_make_the_run_void(apiary: Run, client: Client, out: Path) -> None:
    flags = "--sessions 2 --turns 2 --input 20 --output 60 --policy full(bound=64)"
    done = apiary("bench", "serve", *flags.split(), "--json", str(out))
    assert done.returncode == 1
    assert "2 cut short, 2 failed (CONTEXT_FULL 2): VOID" in done.stdout
    assert done.stderr.splitlines()[-1].startswith("error: the run is void")
    summary = read(out)["summary"]
    assert (summary["void"], summary["reasons"]) == (True, {"CONTEXT_FULL": 2})
    assert list(client.list_sessions()) == []


def test_history_that_does_not_fit_leaves_nothing(apiary: Run, client: Client, out: Path) -> None:
    flags = "--sessions 2 --history 100 --policy full(bound=64)"
    done = apiary("bench", "serve", *flags.split(), "--json", str(out))
    assert (done.returncode, done.stdout, out.exists()) == (1, "", False)
    assert "error: history of sessions/bench-" in done.stderr
    assert "CONTEXT_FULL" in done.stderr
    assert list(client.list_sessions()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_load_that_is_stopped_deletes_its_sessions(
    number: signal.Signals, worker: Worker, client: Client, tmp_path: Path
) -> None:
    background = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh"]  # as a shell starts it there
    with (tmp_path / "err").open("wb") as err:
        load = subprocess.Popen(
            [*background, APIARY, "bench", "serve", "--sessions", "3", "--output", "30000"],
            env=environment(APIARY_TARGET=worker.target),
            stdout=subprocess.DEVNULL,
            stderr=err,
        )
        try:
            assert until(lambda: client.get_capacity().running_turns == 3, 30)
            load.send_signal(number)
            assert load.wait(30) == 130
        finally:
            load.kill()
            load.wait(30)
    assert list(client.list_sessions()) == []
    assert "stopped; nothing is reported" in (tmp_path / "err").read_text()
