"""Where the backend is tested: on a CPU with recorded operations, and on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from apiary_server.model.backends.cuda.graphs import Capture, Graphs
from tests.server.model.backends.cuda.recorder import Recorder

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def capture(device: torch.device) -> Capture:
    return Graphs(device) if device.type == "cuda" else Recorder()
