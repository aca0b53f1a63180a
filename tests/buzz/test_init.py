from __future__ import annotations

import subprocess
import sys

import buzz


def test_importing_buzz_brings_torch_and_nothing_of_the_service() -> None:
    code = "import buzz, sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    loaded = set(done.stdout.split())
    assert {"buzz", "torch"} <= loaded
    assert loaded.isdisjoint({"grpc", "transformers", "apiary", "apiary_server", "apiary_client", "pydantic"})


def test_what_is_public_exists() -> None:
    assert len(set(buzz.__all__)) == len(buzz.__all__) > 0
    assert [name for name in buzz.__all__ if not hasattr(buzz, name)] == []
