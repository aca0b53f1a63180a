"""How the clients reach a worker: channel options, credentials, retries and metadata."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

DEFAULT_TARGET = "127.0.0.1:50051"
MAX_MESSAGE_BYTES = 64 * 2**20

TENANT_KEY = "x-apiary-tenant"
SESSION_KEY = "x-apiary-session"

# Calls that may be repeated without harm. A turn is not among them: it would be appended twice.
_IDEMPOTENT = {
    "apiary.v1.GenerationService": ("Tokenize", "Detokenize"),
    "apiary.v1.ModelService": ("GetModel", "GetCapacity"),
    "apiary.v1.SessionService": ("GetSession", "ListSessions", "GetCacheMap"),
}

SERVICE_CONFIG: dict[str, Any] = {
    "methodConfig": [
        {
            "name": [
                {"service": service, "method": method}
                for service, methods in _IDEMPOTENT.items()
                for method in methods
            ],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}


@dataclass(frozen=True, slots=True)
class TLS:
    """Encrypt, and check the worker's certificate against `root_file` (PEM), or the system's roots."""

    root_file: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the roots.

        Raises:
            OSError: `root_file` cannot be read.
        """
        return grpc.ssl_channel_credentials(self.root_file.read_bytes() if self.root_file else None)


def options(max_message_bytes: int) -> list[tuple[str, Any]]:
    """Return the channel options of both clients."""
    return [
        ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        # Finds a dead connection while an answer streams; rare enough for any server's ping limits.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
    ]


def metadata(tenant: str | None, session: str | None) -> tuple[tuple[str, str], ...]:
    """Return a call's metadata: who asks, and for routers the name of the session that it is about."""
    pairs = [(TENANT_KEY, tenant)] if tenant else []
    # What a header cannot carry is no session's name: the worker refuses it with a better message.
    if session and session.isascii() and session.isprintable():
        pairs.append((SESSION_KEY, session))
    return tuple(pairs)


def check_tenant(tenant: str | None) -> str | None:
    """Return `tenant` if a header can carry it.

    Raises:
        ValueError: it cannot.
    """
    if tenant is not None and not (tenant and tenant.isascii() and tenant.isprintable()):
        raise ValueError(f"tenant {tenant!r} must be printable ASCII, at least one character")
    return tenant
