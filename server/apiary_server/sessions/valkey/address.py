"""Where a namespace of a Valkey server is, as a URL says it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self
from urllib.parse import parse_qsl, unquote, urlsplit

_FORM = (
    "write valkey://HOST:PORT/DB?namespace=NAME&lease=SECONDS (valkeys:// for TLS, with ca=FILE where the "
    "system does not know the authority; unix:///PATH?db=DB for a socket), and in a user or a password %XX "
    "for what is no letter or digit"
)
_QUERY = {
    "valkey": {"namespace", "lease"},
    "valkeys": {"namespace", "lease", "ca"},
    "unix": {"namespace", "lease", "db"},
}
_NAMESPACE = re.compile(r"[A-Za-z0-9._-]{1,100}")
_LEASES = (1.0, 300.0)


@dataclass(frozen=True, slots=True)
class ValkeyAddress:
    """A server, a user, and a namespace there.

    Attributes:
        options: how `valkey.Valkey` connects; with the password.
        namespace: what all keys begin with.
        lease: seconds for which a worker that does not say anything still owns the namespace.
        shown: all of it but user and password, for messages.
    """

    options: Mapping[str, Any] = field(repr=False)
    namespace: str
    lease: float
    shown: str

    @classmethod
    def parse(cls, url: str) -> Self:
        """Read a URL. What is said of a malformed one repeats no part of it: any could be of the password.

        Raises:
            ValueError: it is malformed.
        """
        try:
            parts = urlsplit(url)
            query = dict(parse_qsl(parts.query, keep_blank_values=True))
            options, place = _connection(parts.scheme, parts.hostname, parts.port, unquote(parts.path), query)
            lease = float(query.get("lease", 10.0))
            namespace = query.get("namespace", "apiary")
            whole = not parts.fragment and query.keys() <= _QUERY[parts.scheme]
            if not (whole and _NAMESPACE.fullmatch(namespace) and _LEASES[0] <= lease <= _LEASES[1]):
                raise ValueError
        except (ValueError, KeyError):
            raise ValueError(f"this is not the URL of a store: {_FORM}") from None
        if parts.username:
            options["username"] = unquote(parts.username)
        if parts.password:
            options["password"] = unquote(parts.password)
        return cls(options, namespace, lease, f"{place}namespace={namespace}")

    def with_password(self, password: str) -> Self:
        """The same, with a password that the URL does not have."""
        return replace(self, options={**self.options, "password": password})


def _connection(
    scheme: str, host: str | None, port: int | None, path: str, query: Mapping[str, str]
) -> tuple[dict[str, Any], str]:
    """How to connect, and how to say that."""
    if scheme == "unix":
        if host or not path.startswith("/"):
            raise ValueError
        db = _number(query.get("db", "0"))
        return {"unix_socket_path": path, "db": db}, f"unix://{path}?db={db}&"
    if not host:
        raise ValueError
    db = _number(path.removeprefix("/") or "0")
    port = 6379 if port is None else port
    options: dict[str, Any] = {"host": host, "port": port, "db": db, "socket_keepalive": True}
    if scheme == "valkeys":
        options |= {"ssl": True, "ssl_check_hostname": True, "ssl_ca_certs": query.get("ca")}
    shown = f"[{host}]" if ":" in host else host
    return options, f"{scheme}://{shown}:{port}/{db}?"


def _number(text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text):
        raise ValueError
    return int(text)
