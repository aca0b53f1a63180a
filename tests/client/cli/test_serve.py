"""`apiary serve`: its flags are the settings, and bad ones are told by their flags."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest

from apiary_client.cli.serve import serve
from apiary_server.settings import Settings

from ..conftest import Run

FLAGS = [name for name in inspect.signature(serve).parameters if name not in {"context", "config"}]


def test_every_setting_has_its_flag() -> None:
    assert sorted(FLAGS) == sorted(Settings.model_fields)


@pytest.mark.parametrize("name", FLAGS)
def test_help_states_the_true_default(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(f"APIARY_{name.upper()}", raising=False)
    option: Any = get_args(get_type_hints(serve, include_extras=True)[name])[1]
    default = getattr(Settings(), name)
    stated = re.search(r"\[default: (.+?)\]", option.help)
    if stated is None:
        assert default in (None, False, {})
    else:
        assert getattr(Settings.load(**{name: stated[1]}), name) == default


def test_bad_settings_are_told_by_flag(apiary: Run) -> None:
    done = apiary(
        "serve", "--max-running", "many", "--cache-budget", "3QB", "--log-level", "loud", APIARY_SLACK="0"
    )
    assert (done.returncode, done.stdout) == (2, "")
    said = sorted(done.stderr.splitlines())
    assert [line.split(":")[1].strip() for line in said] == [
        "--cache-budget",
        "--log-level",
        "--max-running",
        "--slack",
    ]
    assert "write for example 512MiB" in said[0]
    assert "'debug', 'info', 'warning' or 'error'" in said[1]
    assert "greater than or equal to 1, got '0'" in said[3]


def test_settings_that_do_not_go_together_are_told(apiary: Run) -> None:
    done = apiary("serve", "--listen", "0.0.0.0:50051")
    assert done.returncode == 2
    assert "set --tls-cert-file and --tls-key-file, or --insecure" in done.stderr


def test_config_files(apiary: Run, tmp_path: Path) -> None:
    config = tmp_path / "worker.toml"
    assert "no config file" in apiary("serve", "--config", str(config)).stderr
    config.write_text("bees = 3\nslack = 0\n")
    done = apiary("serve", "--config", str(config))
    assert done.returncode == 2
    assert "bees is no setting" in done.stderr
    assert "--slack: " in done.stderr
    config.write_text("bees =")
    done = apiary("serve", "--config", str(config))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_the_worker_starts_with_the_settings(apiary: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Settings] = []
    # in place of the real one, which would load torch
    monkeypatch.setitem(sys.modules, "apiary_server.main", SimpleNamespace(serve=started.append))
    done = apiary("serve", "--listen", "0.0.0.0:0", "--insecure", "--cache-budget", "2GiB", "--threads", "2")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (settings,) = started
    assert (settings.insecure, settings.cache_budget, settings.threads) == (True, 2 * 2**30, 2)


def test_a_missing_extra_is_told(process: Run, tmp_path: Path) -> None:
    broken = "raise ModuleNotFoundError('no', name='pydantic_settings')"
    (tmp_path / "pydantic_settings.py").write_text(broken)
    done = process("serve", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == (
        "error: the worker's library pydantic_settings is missing: pip install 'apiary[server]'\n"
    )
