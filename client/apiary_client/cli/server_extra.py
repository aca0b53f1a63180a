"""The commands that run on the worker's own code: what they need, and how its errors are told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from apiary_client.cli import console

_OURS = {"apiary", "apiary_client", "apiary_server", "buzz"}


@contextmanager
def server_extra(extra: str = "server") -> Iterator[None]:
    """Tell a missing extra and the worker's own errors in one line; import the worker inside."""
    try:
        from apiary_server.errors import ApiaryError

        try:
            yield
        except ApiaryError as error:
            console.fail(error.message)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in _OURS:
            raise  # a fault of ours, not of the installation
        owner = "worker" if extra == "server" else "benchmark"
        console.fail(f"the {owner}'s library {error.name} is missing: pip install 'apiary[{extra}]'")
