"""Fixtures that all tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from apiary_server.model import catalog


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The directory of the real default model, fetched and converted on first use.

    The first use takes up to a minute and downloads 93 MB; `make test` does it before the tests start.
    """
    return catalog.pull("smollm2-135m")
