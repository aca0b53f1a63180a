"""Logs: machine-readable when asked or piped, readable on a terminal, without local variables."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from apiary_server import logs
from apiary_server.settings import Settings

SECRET = "my prompt"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("apiary_server")
    handlers, levels = root.handlers, (root.level, ours.level)
    yield
    root.handlers = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])
    structlog.reset_defaults()


def _log(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, **settings: Any) -> str:
    """What a few lines and an exception become."""
    monkeypatch.setattr(sys, "stderr", stream)
    logs.configure(Settings(**settings))
    log = structlog.get_logger("apiary_server.some.part")
    log.debug("a detail")
    log.info("an event", count=3)
    prompt = SECRET
    try:
        raise ValueError(len(prompt))
    except ValueError:
        log.exception("it failed", incident="abc")
    logging.getLogger("somebody.else").info("chatter")
    logging.getLogger("somebody.else").warning("a warning")
    return stream.getvalue()


@pytest.mark.parametrize("log_format", ["auto", "json"])
def test_json(monkeypatch: pytest.MonkeyPatch, log_format: str) -> None:
    text = _log(monkeypatch, io.StringIO(), log_format=log_format)
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["event"] for line in lines] == ["an event", "it failed", "a warning"]
    event, failure, foreign = lines
    assert (event["count"], event["level"], event["logger"]) == (3, "info", "apiary_server.some.part")
    assert event["timestamp"].endswith("Z")
    assert failure["incident"] == "abc"
    assert "raise ValueError" in failure["exception"]
    assert (foreign["level"], foreign["logger"]) == ("warning", "somebody.else")


@pytest.mark.parametrize(
    ("stream", "log_format"), [(_Terminal(), "auto"), (_Terminal(), "console"), (io.StringIO(), "console")]
)
def test_console(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, log_format: str) -> None:
    text = _log(monkeypatch, stream, log_format=log_format)
    assert "an event" in text
    assert "raise ValueError" in text
    assert not text.startswith("{")


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_local_variables_are_not_shown(monkeypatch: pytest.MonkeyPatch, log_format: str) -> None:
    assert SECRET not in _log(monkeypatch, io.StringIO(), log_format=log_format)


@pytest.mark.parametrize(("level", "ours"), [("debug", 3), ("info", 2), ("error", 1)])
def test_levels(monkeypatch: pytest.MonkeyPatch, level: str, ours: int) -> None:
    lines = _log(monkeypatch, io.StringIO(), log_level=level, log_format="json").splitlines()
    assert len([line for line in lines if "apiary_server" in json.loads(line)["logger"]]) == ours
    assert not any("chatter" in line for line in lines)
