"""What metadata and deadline say of a call."""

from __future__ import annotations

import time
from typing import Any

import pytest

from apiary_server.errors import InvalidField
from apiary_server.rpc.caller import caller


class _Context:
    def __init__(self, *metadata: tuple[str, str | bytes], remaining: float | None = None) -> None:
        self._metadata, self._remaining = metadata, remaining

    def invocation_metadata(self) -> Any:
        return self._metadata

    def time_remaining(self) -> float | None:
        return self._remaining


def test_a_bare_call() -> None:
    who = caller(_Context())
    assert (who.tenant, who.deadline, dict(who.trace_headers)) == ("default", None, {})


def test_everything_said() -> None:
    who = caller(
        _Context(
            ("x-apiary-tenant", "Bees_1.a-b"),
            ("traceparent", "00-1-2-01"),
            ("tracestate", "a=b"),
            ("user-agent", "x"),
            remaining=2.0,
        )
    )
    assert who.tenant == "Bees_1.a-b"
    assert who.trace_headers == {"traceparent": "00-1-2-01", "tracestate": "a=b"}
    assert who.deadline == pytest.approx(time.monotonic() + 2.0, abs=0.5)


@pytest.mark.parametrize("tenant", ["", "a b", "a/b", "ä", "a" * 64, "a\n"])
def test_a_malformed_tenant(tenant: str) -> None:
    with pytest.raises(InvalidField, match="x-apiary-tenant"):
        caller(_Context(("x-apiary-tenant", tenant)))


def test_a_tenant_given_twice_or_in_binary() -> None:
    with pytest.raises(InvalidField, match="once"):
        caller(_Context(("x-apiary-tenant", "a"), ("x-apiary-tenant", "a")))
    with pytest.raises(InvalidField, match="must be 1 to 63"):
        caller(_Context(("x-apiary-tenant-bin", b"a")))
