"""Who calls: what a call's metadata and deadline say."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from grpc.aio import ServicerContext

from apiary_server.engine.request import TENANT
from apiary_server.errors import InvalidField

Context = ServicerContext[Any, Any]

TENANT_KEY = "x-apiary-tenant"
_TRACE_KEYS = ("traceparent", "tracestate")  # W3C Trace Context


@dataclass(frozen=True, slots=True)
class Caller:
    """`deadline` is in seconds of `time.monotonic()`, None if the call has none."""

    tenant: str = "default"
    deadline: float | None = None
    trace_headers: Mapping[str, str] = field(default_factory=dict)


def caller(context: Context) -> Caller:
    """Read a call's tenant, deadline and trace headers.

    Raises:
        InvalidField: the tenant is malformed, binary or given twice.
    """
    tenants: list[str] = []
    headers: dict[str, str] = {}
    for key, value in context.invocation_metadata() or ():
        text = value if isinstance(value, str) else ""
        if key in (TENANT_KEY, f"{TENANT_KEY}-bin"):
            tenants.append(text)
        elif key in _TRACE_KEYS:
            headers[key] = text
    if len(tenants) > 1:
        raise InvalidField([(TENANT_KEY, "must be given once")])
    if tenants and re.fullmatch(TENANT, tenants[0]) is None:
        raise InvalidField([(TENANT_KEY, "must be 1 to 63 of A-Z, a-z, 0-9, '.', '_', '-'")])
    remaining: float | None = context.time_remaining()
    return Caller(
        tenant=tenants[0] if tenants else Caller().tenant,
        deadline=None if remaining is None else time.monotonic() + remaining,
        trace_headers=headers,
    )
