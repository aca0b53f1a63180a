"""Tells models apart whose caches must not be mixed up."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_SAMPLES = 256  # places of each file that are read
_SAMPLE = 4096  # bytes at each


def fingerprint(path: Path, *how: str) -> str:
    """A digest of a model and of how it is computed.

    Of the weights it reads samples, evenly spaced: to read gigabytes at each start would take longer than
    all else. Training changes weights everywhere; who edits single ones by hand can change `config.json` too.

    Args:
        path: a Hugging Face directory.
        how: whatever else makes its keys and values different, such as the weights' precision.
    """
    digest = hashlib.sha256("\0".join(how).encode())
    digest.update((path / "config.json").read_bytes())
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb", buffering=0) as weights:
            size = os.fstat(weights.fileno()).st_size
            digest.update(f"{file.name}\0{size}\0".encode())
            for place in range(_SAMPLES):
                weights.seek(place * size // _SAMPLES)
                digest.update(weights.read(_SAMPLE))
    return digest.hexdigest()
