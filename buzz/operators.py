"""Operators for which a backend may register kernels of its own: `torch.ops.buzz`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("buzz", "DEF")


def define(schema: str, default: Callable[..., Any]) -> None:
    """Make an operator that does on every device what `default` does, until a backend has one for its own.

    Args:
        schema: its name, arguments and result, as torch writes them.
        default: a function of these.
    """
    _library.define(schema)
    _library.impl(schema.partition("(")[0], default, "CompositeExplicitAutograd")
