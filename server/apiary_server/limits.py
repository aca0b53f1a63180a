"""Limits that pydantic has no words for."""

from __future__ import annotations

from collections.abc import Sized

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError


def sized(least: int, most: int) -> BeforeValidator:
    """How many entries there may be; checked first, since of a million bad ones each would be named."""

    def check(value: object) -> object:
        if isinstance(value, Sized) and not least <= len(value) <= most:
            limits = {"there": len(value), "least": least, "most": most}
            raise PydanticCustomError("size", "has {there} entries, {least} to {most} are allowed", limits)
        return value

    return BeforeValidator(check)
