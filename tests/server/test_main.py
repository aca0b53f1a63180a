"""How a worker's process starts and ends: real processes and signals, before a fake engine."""

from __future__ import annotations

import json
import logging
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub

from apiary.v1 import generation_pb2
from apiary.v1.generation_pb2_grpc import GenerationServiceStub
from apiary_server import main
from apiary_server.errors import ApiaryError, InvalidField
from apiary_server.settings import Settings

READY = re.compile(
    r"apiary: ready on (127\.0\.0\.1:\d+) \(model fake, policy buzz\([^)]*\), budget 1\.0 GiB\)\n"
)
HI = generation_pb2.GenerateRequest(text="hi")


class Worker:
    """A started worker and a channel to it."""

    def __init__(self, count: int, pace: float, grace: float) -> None:
        module = "tests.server.fake_worker_process"
        command = [sys.executable, "-m", module, str(count), str(pace), str(grace)]
        root = Path(__file__).parents[2]
        self.process = subprocess.Popen(
            command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        ready = READY.fullmatch(self.process.stdout.readline())
        assert ready is not None
        self.channel = grpc.insecure_channel(ready[1])
        self.stub = GenerationServiceStub(self.channel)
        self.health = HealthStub(self.channel)

    def end(self) -> tuple[int, str, list[dict[str, object]]]:
        """The exit code, the rest of stdout, and the logs; waits for the process."""
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, [json.loads(line) for line in err.splitlines() if line[0] == "{"]


@pytest.fixture
def start() -> Iterator[Callable[[int, float, float], Worker]]:
    """Starts workers, and kills those that a failed test leaves."""
    workers: list[Worker] = []

    def begin(count: int, pace: float, grace: float) -> Worker:
        workers.append(Worker(count, pace, grace))
        return workers[-1]

    yield begin
    for worker in workers:
        worker.channel.close()
        worker.process.kill()
        worker.process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(start: Callable[..., Worker], number: signal.Signals) -> None:
    worker = start(20, 0.1, 10.0)
    watch = worker.health.Watch(health_pb2.HealthCheckRequest(), timeout=30)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    running = worker.stub.StreamGenerate(HI)
    answer = next(running).text
    worker.process.send_signal(number)
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    with pytest.raises(grpc.RpcError) as caught:
        worker.stub.Generate(HI)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    answer += "".join(response.text for response in running)
    assert answer == "".join(f"t{place} " for place in range(20))
    watch.cancel()
    code, out, logs = worker.end()
    assert (code, out) == (0, "")
    assert [one["event"] for one in logs] == ["draining", "drained"]


def test_turns_that_outlast_the_grace_end_with_an_error(start: Callable[..., Worker]) -> None:
    worker = start(10_000, 0.05, 0.3)
    running = worker.stub.StreamGenerate(HI)
    next(running)
    worker.process.send_signal(signal.SIGTERM)
    with pytest.raises(grpc.RpcError) as caught:
        list(running)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert worker.end()[0] == 0


def test_a_second_signal_ends_it_at_once(start: Callable[..., Worker]) -> None:
    worker = start(10_000, 0.05, 60.0)
    watch = worker.health.Watch(health_pb2.HealthCheckRequest(), timeout=30)
    next(watch)
    running = worker.stub.StreamGenerate(HI)
    next(running)
    worker.process.send_signal(signal.SIGTERM)
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    began = time.monotonic()
    worker.process.send_signal(signal.SIGTERM)  # as `timeout` does: the same one again
    next(running)
    time.sleep(1.1)
    worker.process.send_signal(signal.SIGTERM)
    assert worker.end()[0] == 128 + signal.SIGTERM
    assert time.monotonic() - began < 5
    assert running.code() is grpc.StatusCode.UNAVAILABLE


def test_a_broken_engine_ends_it(start: Callable[..., Worker]) -> None:
    worker = start(10_000, 0.05, 60.0)
    watch = worker.health.Watch(health_pb2.HealthCheckRequest(), timeout=30)
    next(watch)
    breaking = worker.stub.StreamGenerate(generation_pb2.GenerateRequest(text="hi", policy="break"))
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    code, _, logs = worker.end()
    assert code == main.EXIT_UNHEALTHY == 70
    assert logs[0]["level"] == "critical"
    assert breaking.code() is not grpc.StatusCode.OK


@pytest.fixture
def _own_logs() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("apiary_server")
    handlers, levels = root.handlers, (root.level, ours.level)
    yield
    root.handlers = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])
    structlog.reset_defaults()


def _fails(error: Exception) -> Callable[..., object]:
    def build(settings: Settings, observer: object) -> object:
        raise error

    return build


class _NoSuchModel(ApiaryError):
    """What a loader may raise."""


@pytest.mark.usefixtures("_own_logs")
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (_NoSuchModel("there is no model\n  of that name"), 2),
        (InvalidField([("policy", "no policy named nonsense")]), 2),
        (ValueError("the cache budget is too small"), 2),
        (PermissionError("no access to /models"), 1),
    ],
)
def test_what_cannot_start_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    monkeypatch.setattr(main, "_build", _fails(error))
    with pytest.raises(SystemExit) as caught:
        main.serve(Settings(listen="127.0.0.1:0"))
    assert caught.value.code == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["apiary: loading smollm2-135m", f"apiary: {' '.join(str(error).split())}"]


@pytest.mark.usefixtures("_own_logs")
@pytest.mark.parametrize("setting", ["listen", "metrics_port"])
def test_a_taken_port_is_said_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], setting: str
) -> None:
    monkeypatch.setattr(main, "_build", _fails(AssertionError("it was loaded")))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        values = {"listen": f"127.0.0.1:{port}"} if setting == "listen" else {"metrics_port": port}
        with pytest.raises(SystemExit) as caught:
            main.serve(Settings(**{"listen": "127.0.0.1:0", **values}))
    assert caught.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("apiary: ")
    assert "Address already in use" in line
    assert str(port) in line


@pytest.mark.usefixtures("_own_logs")
def test_a_bug_is_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "_build", _fails(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError):
        main.serve(Settings(listen="127.0.0.1:0"))
