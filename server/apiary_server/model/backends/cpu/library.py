"""Finds the compiled kernels. Building the package compiles them; see `hatch_build.py`."""

from __future__ import annotations

import ctypes
import functools
import hashlib
from pathlib import Path

_HERE = Path(__file__).parent


def binary(source: Path) -> Path:
    """Where the compiled form of a C file lies: beside it, named by its contents and the headers', so never
    stale."""
    sources = (*sorted(source.parent.glob("*.h")), source)
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()[:16]
    return source.with_name(f"{source.stem}-{digest}.so")


@functools.cache
def library(name: str) -> ctypes.CDLL:
    """The compiled form of a C file beside this one.

    Raises:
        OSError: it was not built (there was no compiler), or cannot be loaded here.
    """
    return ctypes.CDLL(str(binary(_HERE / f"{name}.c")))
