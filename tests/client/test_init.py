"""`import apiary_client` is light: no torch, no server, quickly there."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

import apiary_client

from .conftest import Run

HEAVY = ("torch", "transformers", "numpy", "apiary_server", "buzz", "pydantic")


@pytest.mark.parametrize("module", ["apiary_client", "apiary_client.aio", "apiary_client.cli"])
def test_importing_the_client_leaves_the_server_out(module: str) -> None:
    code = f"import sys, {module}; print(sorted({set(HEAVY)!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.strip() == "[]"


def test_all_names_exist() -> None:
    assert all(hasattr(apiary_client, name) for name in apiary_client.__all__)
    assert apiary_client.aio.Client is not apiary_client.Client


def test_help_is_quick(process: Run) -> None:
    def seconds() -> float:
        started = time.monotonic()
        assert process("--help").returncode == 0
        return time.monotonic() - started

    assert min(seconds() for _ in range(3)) < 1.5  # the best of three, since the machine may be busy
