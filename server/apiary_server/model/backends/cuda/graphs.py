"""CUDA graphs: the kernels of a function, recorded once and then launched together.

What launches them is fast because nothing else happens: no Python runs, and no shape, address or number that
came from the host can change. See https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Compute = Callable[[], Tensor]
"""Computes on the same memory at every call."""

Capture = Callable[[Compute], Compute]
"""Makes a function that does the same of one, with less of the host's time. Each call computes once, in the
order of the calls. What one returns may be overwritten by the next call of any that was made."""


class Graphs:
    """As `Capture`. The first call of a function runs it, which warms up the libraries below; the second
    records it and launches what was recorded, as all others do.

    No call computes twice, not even to warm up, since computing leaves traces: attention adds to scores.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.side = torch.cuda.Stream(device)
        self.memory = torch.cuda.graph_pool_handle()  # graphs run one after another, so they can share it

    def __call__(self, compute: Compute) -> Compute:
        return _Graph(self, compute)


class _Graph:
    def __init__(self, graphs: Graphs, compute: Compute) -> None:
        self._graphs = graphs
        self._compute = compute
        self._warm = False
        self._recorded: tuple[torch.cuda.CUDAGraph, Tensor] | None = None

    def __call__(self) -> Tensor:
        with torch.cuda.device(self._graphs.device):
            if not self._warm:
                output = self._warmed_up()
                self._warm = True
                return output
            if self._recorded is None:
                self._recorded = self._record()
            graph, output = self._recorded
            graph.replay()
            return output

    def _warmed_up(self) -> Tensor:
        """On the stream that records. It waits for its user before it is used, so memory of what this returns
        is not given to anyone too early."""
        side, user = self._graphs.side, torch.cuda.current_stream()
        side.wait_stream(user)
        with torch.cuda.stream(side):
            output = self._compute()
        user.wait_stream(side)
        return output

    def _record(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._graphs.memory, stream=self._graphs.side):
            output = self._compute()
        return graph, output
