"""Operators for which a backend may register kernels of its own, as `torch.ops` has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_libraries: dict[str, torch.library.Library] = {}


def define(schema: str, default: Callable[..., Any]) -> None:
    """Make an operator that does on every device what `default` does, until a backend has one for its own.

    Args:
        schema: its namespace and name, arguments and result, as torch writes them.
        default: a function of these.
    """
    namespace, _, schema = schema.partition("::")
    if namespace not in _libraries:
        _libraries[namespace] = torch.library.Library(namespace, "DEF")
    library = _libraries[namespace]
    library.define(schema)
    library.impl(schema.partition("(")[0], default, "CompositeExplicitAutograd")
