from __future__ import annotations

from typing import Any

import pytest

from apiary_client import aio


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """With what each client was made."""
    made: list[dict[str, Any]] = []

    class Client(aio.Client):
        def __init__(self, target: str, **options: Any) -> None:
            made.append({"target": target} | options)
            super().__init__(target, **options)

    monkeypatch.setattr(aio, "Client", Client)
    return made
