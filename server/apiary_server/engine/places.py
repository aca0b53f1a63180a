"""Places in the queue for turns that are on their way there: a full queue is told before anything is done."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Mapping


class Place:
    """The right to one place, until `release` (which may be called twice)."""

    def __init__(self, release: Callable[[], None]) -> None:
        self._releases = [release]

    def release(self) -> None:
        """The turn is in the queue, or will never be. From any thread."""
        with contextlib.suppress(IndexError):  # a pop is atomic: only one of two gets it
            self._releases.pop()()


class Places:
    """The places that are taken. Thread-safe, and never waits for more than an instant."""

    def __init__(self) -> None:
        self._taken = Counter[str]()  # by tenant
        self._lock = threading.Lock()

    def __len__(self) -> int:
        with self._lock:
            return self._taken.total()

    def take(self, tenant: str, check: Callable[[str, Mapping[str, int]], None]) -> Place:
        """Take one for a tenant, unless `check` raises, given the tenant and how many each has taken."""
        with self._lock:
            check(tenant, self._taken)
            self._taken[tenant] += 1
        return Place(lambda: self._release(tenant))

    def _release(self, tenant: str) -> None:
        with self._lock:
            self._taken[tenant] -= 1
            self._taken += Counter()  # forgets tenants without any
