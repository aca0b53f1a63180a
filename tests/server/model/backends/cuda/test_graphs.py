"""What is asked of torch.cuda, in which order; a GPU, where there is one, is asked by `test_cuda`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from apiary_server.model.backends.cuda.graphs import Graphs


class FakeCuda:
    """Notes what happens, and on which stream."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.stream_now = "main"

    def Stream(self, device: torch.device) -> FakeStream:
        return FakeStream(self, "side")

    def current_stream(self) -> FakeStream:
        return FakeStream(self, self.stream_now)

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        yield

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.stream_now = self.stream_now, stream.name
        yield
        self.stream_now = before

    def graph_pool_handle(self) -> str:
        return "pool"

    def CUDAGraph(self) -> FakeGraph:
        return FakeGraph(self)

    @contextmanager
    def graph(self, graph: FakeGraph, pool: str, stream: FakeStream) -> Iterator[None]:
        self.log.append(f"capture into {pool}")
        with self.stream(stream):
            yield
        self.log.append("captured")


class FakeStream:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_stream(self, other: FakeStream) -> None:
        self.cuda.log.append(f"{self.name} waits for {other.name}")


class FakeGraph:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def replay(self) -> None:
        self.cuda.log.append(f"replay on {self.cuda.stream_now}")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    for name in ("Stream", "current_stream", "device", "stream", "graph_pool_handle", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    return fake


RUN = ["side waits for main", "run on side", "main waits for side"]
CAPTURE = ["capture into pool", "run on side", "captured", "replay on main"]


def test_the_first_call_warms_up_the_second_captures(cuda: FakeCuda) -> None:
    output = torch.zeros(1)

    def compute() -> Tensor:
        cuda.log.append(f"run on {cuda.stream_now}")
        return output

    captured = Graphs(torch.device("cuda"))(compute)
    logs: list[list[str]] = []
    for _ in range(4):
        cuda.log.clear()
        assert captured() is output
        logs.append(list(cuda.log))
    assert logs == [RUN, CAPTURE, ["replay on main"], ["replay on main"]]


def test_what_fails_is_tried_again(cuda: FakeCuda) -> None:
    failing: list[Any] = [True, False, True, False]

    def compute() -> Tensor:
        cuda.log.append(f"run on {cuda.stream_now}")
        if failing.pop(0):
            raise RuntimeError("out of memory")
        return torch.zeros(1)

    captured = Graphs(torch.device("cuda"))(compute)
    for log in (RUN[:2], RUN, CAPTURE[:2], CAPTURE):
        cuda.log.clear()
        cuda.stream_now = "main"
        if len(log) == 2:
            with pytest.raises(RuntimeError, match="out of memory"):
                captured()
        else:
            captured()
        assert cuda.log == log
