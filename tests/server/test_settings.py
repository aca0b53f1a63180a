"""Sizes, sources and their precedence, addresses, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from apiary_server.settings import Settings, parse_bytes


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's own APIARY_* variables do not count here."""
    for name in Settings.model_fields:
        monkeypatch.delenv(f"APIARY_{name.upper()}", raising=False)


def refused(why: str, **fields: Any) -> None:
    with pytest.raises(ValidationError, match=why):
        Settings.load(**fields)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1234", 1234),
        ("7B", 7),
        ("512MiB", 512 * 2**20),
        ("1.5GiB", 3 * 2**29),
        (" 2 gib ", 2**31),
        ("1TiB", 2**40),
        ("3KB", 3000),
        ("2GB", 2 * 10**9),
        ("0.5kib", 512),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size
    assert Settings.load(cache_budget=text).cache_budget == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "0x10", "1GiBs", "1,5GiB", "nan", "٣", "1 2"])
def test_what_is_no_size(text: str) -> None:
    refused("is not a size; write for example 512MiB", cache_budget=text)


@given(st.integers(0, 2**50))
def test_plain_numbers_are_bytes(number: int) -> None:
    assert parse_bytes(str(number)) == parse_bytes(number) == number


def test_sizes_are_whole_and_not_negative() -> None:
    refused("greater than or equal to 0", cache_budget=-1)
    refused("fractional", cache_budget=1.5)


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("", {}),
        ("bees=2", {"bees": 2.0}),
        (" bees = 2 , wasps=0.5,", {"bees": 2.0, "wasps": 0.5}),
        ("A.b_c-1=1e2", {"A.b_c-1": 100.0}),
    ],
)
def test_weights(text: str, weights: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings.load(tenant_weights=text).tenant_weights == weights
    monkeypatch.setenv("APIARY_TENANT_WEIGHTS", text)
    assert Settings.load().tenant_weights == weights


@pytest.mark.parametrize("text", ["tenant_weights = {bees = 2}", "[tenant_weights]\nbees = 2.0"])
def test_weights_may_be_a_table_of_the_file(tmp_path: Path, text: str) -> None:
    config = tmp_path / "worker.toml"
    config.write_text(text)
    assert Settings.load(config=config).tenant_weights == {"bees": 2.0}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("bees", "'bees' is no weight, or a second one; write for example bees=2,wasps=0.5"),
        ("bees=2,bees=3", "'bees=3' is no weight, or a second one"),
        ("bees=many", "valid number"),
        ("bees=0", "greater than or equal to 0.001"),
        ("bees=nan", "finite|greater than or equal"),
        ("two words=1", "should match pattern"),
        ("=1", "should match pattern"),
    ],
)
def test_what_is_no_weight(text: str, why: str) -> None:
    refused(why, tenant_weights=text)


def test_flags_win_over_variables_and_these_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "worker.toml"
    config.write_text('slack = 3\nstep_tokens = 5\nqueue_limit = 7\ncache_budget = "2GiB"\n')
    monkeypatch.setenv("APIARY_SLACK", "30")
    monkeypatch.setenv("APIARY_STEP_TOKENS", "50")
    settings = Settings.load(config=config, slack=300, model=None)
    assert (settings.slack, settings.step_tokens, settings.queue_limit) == (300, 50, 7)
    assert settings.cache_budget == 2**31
    assert settings.model == Settings.model_fields["model"].default  # None counts as absent
    assert Settings.load().queue_limit != 7, "a file must not outlive its call"


def test_variables_are_read_like_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APIARY_CACHE_BUDGET", "3GiB")
    monkeypatch.setenv("apiary_insecure", "true")
    monkeypatch.setenv("APIARY_METRICS_PORT", "9090")
    settings = Settings.load(listen="0.0.0.0:1")
    assert (settings.cache_budget, settings.insecure, settings.metrics_port) == (3 * 2**30, True, 9090)


@pytest.mark.parametrize("text", ['cach_budget = "1GiB"', "[server]\nslack = 3"])
def test_unknown_keys_of_the_file_are_refused(tmp_path: Path, text: str) -> None:
    config = tmp_path / "worker.toml"
    config.write_text(text)
    refused("Extra inputs are not permitted", config=config)


def test_unknown_flags_are_refused() -> None:
    refused("Extra inputs are not permitted", cash_budget="1GiB")


@pytest.mark.parametrize("content", [b"slack = ", b"slack 3", b"\xff\xfe", b"slack = 3\nslack = 4"])
def test_a_file_that_is_not_toml_is_named(tmp_path: Path, content: bytes) -> None:
    config = tmp_path / "worker.toml"
    config.write_bytes(content)
    with pytest.raises(ValueError, match=r"worker\.toml is not TOML: ") as refusal:
        Settings.load(config=config)
    assert not isinstance(refusal.value, ValidationError)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.toml", tmp_path):
        with pytest.raises(FileNotFoundError, match=str(path)):
            Settings.load(config=path)


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "127.8.9.1:1", "localhost:50051", "[::1]:65535"])
def test_plaintext_is_for_this_machine(listen: str) -> None:
    assert Settings.load(listen=listen).listen == listen


@pytest.mark.parametrize(
    "listen",
    ["0.0.0.0:50051", "[::]:50051", "10.0.0.1:1", "worker:1", "127.example.com:1", "127.0.0.1.example.com:1"],
)
def test_others_need_tls_or_a_word(listen: str, tmp_path: Path) -> None:
    refused("can be reached by others: set tls_cert_file and tls_key_file, or --insecure", listen=listen)
    assert Settings.load(listen=listen, insecure=True).insecure
    for name in ("cert", "key"):
        (tmp_path / name).write_text("PEM")
    tls = {"tls_cert_file": str(tmp_path / "cert"), "tls_key_file": str(tmp_path / "key")}
    assert not Settings.load(listen=listen, **tls).insecure


@pytest.mark.parametrize(
    "listen", ["", ":50051", "50051", "host", "host:", "host:http", "host:65536", "host:-1", "host:²"]
)
def test_what_is_no_address(listen: str) -> None:
    refused("is not HOST:PORT, for example 127.0.0.1:50051", listen=listen, insecure=True)


@pytest.mark.parametrize("name", ["tls_cert_file", "tls_key_file"])
def test_half_of_tls_is_refused(name: str, tmp_path: Path) -> None:
    refused(name, **{name: str(tmp_path / "missing")})
    refused("tls_cert_file and tls_key_file go together", **{name: __file__})


def test_snapshots_have_two_or_four_bits_or_all() -> None:
    assert Settings.load().snapshot_bits is None
    for bits, meant in (("2", 2), ("4", 4), (4, 4)):
        assert Settings.load(snapshot_bits=bits, state_dir="state").snapshot_bits == meant
    refused("2 or 4", snapshot_bits="3")
    refused("2 or 4", snapshot_bits="four")


@pytest.mark.parametrize("setting", [{"snapshot_bits": 4}, {"checkpoints": 2}, {"durability": "idle"}])
def test_what_is_for_stored_sessions_needs_a_place_for_them(setting: dict[str, object]) -> None:
    refused("is for sessions that are stored: give a --state-dir or a --store", **setting)
    Settings.load(**setting, state_dir="state")


def test_a_store_is_a_url_that_nobody_sees() -> None:
    url = "valkey://:s3cret@bees:6379/0?namespace=hive"
    settings = Settings.load(store=url)
    assert settings.store is not None
    assert settings.store.get_secret_value() == url
    assert "s3cret" not in f"{settings!r} {settings} {settings.model_dump()}"
    with pytest.raises(ValidationError, match="write valkey://HOST:PORT/DB") as refusal:
        Settings.load(store="valkey://:s3cret@bees:port")
    assert "s3cret" not in str(refusal.value)


def test_sessions_have_one_place(tmp_path: Path) -> None:
    refused("state_dir and --store are two places", store="valkey://bees", state_dir=tmp_path)
    (tmp_path / "password").write_text("s3cret\n")
    refused("for a --store, and there is none", store_password_file=tmp_path / "password")
    assert Settings.load(store="valkey://bees", store_password_file=tmp_path / "password").store is not None


@pytest.mark.parametrize("name", ["stall_limit", "step_limit", "session_ttl", "drain_grace"])
@pytest.mark.parametrize("value", ["inf", "nan", "-1"])
def test_times_are_finite(name: str, value: str) -> None:
    refused(name, **{name: value})


def test_sessions_end_before_the_calendar_does() -> None:
    """Expiration times are protobuf timestamps, which end with the year 9999."""
    refused("session_ttl", session_ttl=1e12)
    assert Settings.load(session_ttl=365 * 86_400).session_ttl == 365 * 86_400


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("slack", 0),
        ("workspaces", 0),
        ("workspace_entries", 127),
        ("reserve_slots", 0),
        ("step_tokens", 0),
        ("decode_slowdown", 0.9),
        ("decode_slowdown", "nan"),
        ("max_running", 0),
        ("threads", -1),
        ("metrics_port", 65_536),
        ("dtype", "float64"),
        ("log_level", "loud"),
        ("default_max_tokens", 0),
    ],
)
def test_what_is_out_of_range(name: str, value: object) -> None:
    refused(name, **{name: value})


def test_settings_do_not_change() -> None:
    settings = Settings.load()
    with pytest.raises(ValidationError, match="frozen"):
        settings.slack = 3  # type: ignore[misc]
