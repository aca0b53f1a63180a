"""`apiary bench serve`: the command; its parts have their own tests, and the whole runs in tests/system."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from apiary_bench.serving import generator
from apiary_bench.serving.generator import Run
from apiary_bench.serving.record import Outcome, Record
from apiary_bench.serving.workload import Arrival, Objectives, Workload
from apiary_client import TLS
from apiary_client.cli.app import app
from tests.benchmarks.serving.fake_client import MODEL, capacity, usage

Invoke = Callable[..., Result]

RECORD = Record(
    session=0,
    turn=0,
    sent=0.0,
    ended=2.0,
    arrivals=(1.0, 2.0),
    arrival_tokens=(1, 1),
    input=32,
    asked=2,
    outcome=Outcome.COMPLETED,
    usage=usage(32, 7, 2),
)
RUN = Run(model=MODEL, policy="buzz", before=capacity(), after=capacity(), records=[RECORD], undeleted=[])


@pytest.fixture
def invoke() -> Invoke:
    """Run the command in this process."""
    return lambda *arguments: CliRunner(env={"COLUMNS": "200"}).invoke(app, ["bench", "serve", *arguments])


class Loads:
    """Takes the place of what drives the load, and remembers how it was called."""

    def __init__(self, answer: Run | BaseException) -> None:
        self.workloads: list[Workload] = []
        self.tenants: list[str | None] = []
        self._answer = answer

    async def __call__(self, workload: Workload, connect: generator.Connect, observe: Any) -> Run:
        self.workloads.append(workload)
        for tenant in workload.tenants:
            async with connect(tenant):
                self.tenants.append(tenant)
        if isinstance(self._answer, BaseException):
            raise self._answer
        return self._answer


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Callable[[Run | BaseException], Loads]:
    """Have every load end with this."""

    def end(answer: Run | BaseException) -> Loads:
        fake = Loads(answer)
        monkeypatch.setattr(generator, "run", fake)
        return fake

    return end


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--sessions", "0"], "sessions must be at least 1, not 0"),
        (["--cancel-rate", "2"], "cancel rate must be at least 0 and at most 1, not 2"),
        (["--arrival", "burst"], "arrival burst needs a rate"),
        (["--arrival", "closed", "--rate", "3"], "a closed loop has no rate"),
        (["--slo-ttft", "0"], "the objective TTFT in seconds must be above 0"),
        (["--tenants", "0"], "16 sessions are of 1 to 16 tenants, not 0"),
        (["--json", "nowhere/at/all.json"], "nowhere/at is no directory"),
        (["--tls-root-file", "none.pem"], "none.pem"),
        (["--tenant", "é"], "must be printable ASCII"),
        (["--target", "127.0.0.1:1"], "is a worker running at 127.0.0.1:1?"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(arguments: list[str], why: str, invoke: Invoke) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert why in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_options_are_the_workload(invoke: Invoke, loads: Callable[..., Loads]) -> None:
    called = loads(RUN)
    arguments = (
        "--sessions 5 --turns 4 --history 300 --input 6 --output 7 --policy buzz --rate 2.5 --arrival burst "
        "--cancel-rate 0.5 --slo-ttft 250 --slo-tpot 50 --seed 9 --warmup 1 --timeout 30 "
        "--tenant bees --tenants 2"
    )
    assert invoke(*arguments.split()).exit_code == 0
    assert invoke("--think", "1.5").exit_code == 0
    assert called.workloads == [
        Workload(
            sessions=5,
            turns=4,
            history=300,
            input=6,
            output=7,
            policy="buzz",
            rate=2.5,
            arrival=Arrival.BURST,
            cancel_rate=0.5,
            objectives=Objectives(0.25, 0.05),
            seed=9,
            warmup=1,
            timeout=30.0,
            tenants=("bees-1", "bees-2"),
        ),
        Workload(think=1.5),
    ]
    assert called.tenants == ["bees-1", "bees-2", None]


def test_a_client_gets_the_connection_options(
    invoke: Invoke, loads: Callable[..., Loads], clients: list[dict[str, Any]]
) -> None:
    loads(RUN)
    assert invoke("--target", "localhost:7", "--tls", "--tenant", "bees").exit_code == 0
    assert clients == [{"target": "localhost:7", "tenant": "bees", "tls": TLS()}]


def test_a_report_is_printed_and_written(invoke: Invoke, loads: Callable[..., Loads], tmp_path: Path) -> None:
    loads(RUN)
    path = tmp_path / "serve.json"
    result = invoke("--sessions", "1", "--turns", "1", "--output", "2", "--json", str(path))
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("1 sessions x 1 turns, 32 in, 2 out; closed\nfake, buzz; ")
    assert "time to first token (TTFT)" in result.stdout
    assert "VOID" not in result.stdout
    content = json.loads(path.read_text())
    assert content["summary"]["output_throughput"] == 1.0
    assert content["summary"]["void"] is False
    assert len(content["requests"]) == 1


def test_a_void_run_fails_but_is_reported(
    invoke: Invoke, loads: Callable[..., Loads], tmp_path: Path
) -> None:
    failed = replace(RECORD, outcome=Outcome.FAILED, reason="QUEUE_FULL", usage=None)
    loads(replace(RUN, records=[RECORD, failed], undeleted=["sessions/bench-1"]))
    path = tmp_path / "serve.json"
    result = invoke("--json", str(path))
    assert result.exit_code == 1
    assert "1 completed, 1 failed (QUEUE_FULL 1): VOID" in result.stdout
    undeleted, void = result.stderr.splitlines()
    assert undeleted == "1 sessions could not be deleted: sessions/bench-1"
    assert void.startswith("error: the run is void")
    assert json.loads(path.read_text())["summary"]["void"] is True


def test_a_run_that_is_stopped_reports_nothing(
    invoke: Invoke, loads: Callable[..., Loads], tmp_path: Path
) -> None:
    loads(KeyboardInterrupt())
    result = invoke("--json", str(tmp_path / "serve.json"))
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr == "stopped; nothing is reported\n"
    assert list(tmp_path.iterdir()) == []


def test_the_help_defines_what_is_reported(invoke: Invoke) -> None:
    text = " ".join(invoke("--help").stdout.split())
    for definition in (
        "TTFT: from the request to the first message with a token.",
        "TPOT: (last token - first token) / (tokens - 1)",
        "ITL: the gap between successive arrivals; tokens of one message are one arrival.",
        "Goodput: turns/s that kept all objectives.",
        "Tokens not re-prefilled: the sum of usage.cached_tokens.",
    ):
        assert definition in text
