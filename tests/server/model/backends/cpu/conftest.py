from __future__ import annotations

import os
import shutil

import pytest


@pytest.fixture(autouse=True)
def _compiler() -> None:
    """Where there is a C compiler the kernels must be there; where there is none, they cannot be tested."""
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("there is no C compiler")
