"""Fixtures that all tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from apiary_server.model import catalog

torch.set_num_threads(1)  # tiny products gain nothing from more, and lose much on a busy machine


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The directory of the real default model, fetched and converted on first use.

    The first use takes up to a minute and downloads 93 MB; `make test` does it before the tests start.
    """
    return catalog.pull("smollm2-135m")
