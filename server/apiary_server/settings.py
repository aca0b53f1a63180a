"""Everything that an operator can set: flags win over APIARY_* variables, these over the config file."""

from __future__ import annotations

import ipaddress
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, FilePath, SecretStr, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from apiary_server.engine.request import Tenant
from apiary_server.sessions.valkey.address import ValkeyAddress

_OF_STORED = ("durability", "snapshot_bits", "checkpoints")  # settings
_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_bytes(value: object) -> object:
    """Turn `1GiB`, `512MiB`, `2GB` or a plain number into bytes."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", value)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"{value!r} is not a size; write for example 512MiB or 1.5GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def parse_weights(value: object) -> object:
    """Turn `bees=2,wasps=0.5` into weights by tenant."""
    if not isinstance(value, str):
        return value
    weights: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in value.split(","))):
        tenant, equals, weight = (piece.strip() for piece in part.partition("="))
        if not equals or tenant in weights:
            raise ValueError(f"{part!r} is no weight, or a second one; write for example bees=2,wasps=0.5")
        weights[tenant] = weight
    return weights


def parse_digit(value: object) -> object:
    """Turn `4` as text into the number."""
    return int(value) if isinstance(value, str) and re.fullmatch("[0-9]", value) else value


def _loopback(host: str) -> bool:
    """Whether only this machine can reach it. Other names than localhost may resolve to anything."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=0)]
Weight = Annotated[float, Field(ge=0.001, le=1000)]
Weights = Annotated[dict[Tenant, Weight], NoDecode, BeforeValidator(parse_weights)]


class Settings(BaseSettings):
    """The worker's settings. Sizes in bytes, times in seconds."""

    model_config = SettingsConfigDict(
        env_prefix="APIARY_",
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,  # it may be a password
    )

    # where and what
    listen: str = "127.0.0.1:50051"
    model: str = "smollm2-135m"
    weights: Literal["fp32", "int8"] = "fp32"
    backend: Literal["auto", "reference", "cpu", "cuda"] = "auto"
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    cache_dtype: Literal["float32", "bfloat16", "float16", "int8"] = "float32"
    threads: int = Field(0, ge=0, description="torch threads; 0 lets torch choose")

    # memory
    cache_budget: Bytes = 2**30
    parked_budget: Bytes = 4 * 2**30
    policy: str = "buzz2"
    slack: int = Field(64, ge=1, le=4096, description="entries a slot has beyond the bound")
    workspaces: int = Field(1, ge=1, le=16)
    workspace_entries: int = Field(4096, ge=128, le=2**20)
    reserve_slots: int = Field(1, ge=1, le=1024, description="slots that only running turns may take")
    max_sessions: int = Field(10_000, ge=1)

    # scheduling
    step_tokens: int = Field(256, ge=1, le=65_536, description="most tokens in a step")
    max_running: int = Field(64, ge=1, le=4096, description="most turns in flight")
    decode_slowdown: float = Field(
        2.0, ge=1, le=1000, description="most times longer than its decode tokens alone that a step may take"
    )
    queue_limit: int = Field(256, ge=1)
    tenant_weights: Weights = Field({}, description="shares of tenants; 1 where not named")
    max_prompt_tokens: int = Field(131_072, ge=1)
    default_max_tokens: int = Field(512, ge=1)
    max_tokens: int = Field(32_768, ge=1)
    stall_limit: float = Field(30.0, gt=0, description="a reader that takes nothing for this long is dropped")
    stream_tokens: int = Field(
        1024, ge=1, description="tokens that wait for a slow reader; then its turn pauses"
    )
    reattach_grace: float = Field(
        10.0, ge=0, description="a turn with a request id goes on for this long without its reader"
    )
    step_limit: float = Field(120.0, gt=0, description="a step that hangs this long ends the process")
    session_ttl: float = Field(
        86_400.0, gt=0, le=100 * 365 * 86_400, description="sessions end this long after their last turn"
    )
    drain_grace: float = Field(20.0, ge=0, description="time for running turns after SIGTERM")

    # what outlives the process
    state_dir: Path | None = Field(None, description="sessions are stored there; without it they are not")
    store: SecretStr | None = Field(None, description="the same in a Valkey server, by its URL")
    store_password_file: FilePath | None = Field(None, description="has the password that the URL lacks")
    durability: Literal["turn", "idle", "off"] = "turn"
    snapshot_delay: float = Field(
        30.0,
        ge=0,
        description="with durability=idle, a cache is stored when its session was left alone so long",
    )
    snapshot_key_file: FilePath | None = Field(
        None, description="its bytes sign snapshots, and others are refused"
    )
    snapshot_bits: Annotated[Literal[2, 4], BeforeValidator(parse_digit)] | None = Field(
        None, description="snapshots have most entries in so few bits; answers after a restore may differ"
    )
    stored_budget: Bytes = Field(16 * 2**30, description="of all snapshots; the least recently used go first")
    checkpoints: int = Field(
        0,
        ge=0,
        le=1000,
        description="earlier snapshots of a session that are kept, for rewinds that are quick",
    )
    store_patience: float = Field(2.0, gt=0, description="how long an answer's end waits for a slow store")

    # network and telemetry
    insecure: bool = Field(False, description="allow plaintext on an address that others can reach")
    tls_cert_file: FilePath | None = None
    tls_key_file: FilePath | None = None
    max_message_bytes: Bytes = 8 * 2**20
    otlp_endpoint: str | None = None
    metrics_port: int | None = Field(None, ge=0, le=65_535, description="Prometheus port; absent means none")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "json", "console"] = "auto"

    @field_validator("listen")
    @classmethod
    def _address(cls, value: str) -> str:
        host, _, port = value.rpartition(":")
        if not host or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65_535:
            raise ValueError(f"{value!r} is not HOST:PORT, for example 127.0.0.1:50051 or 0.0.0.0:50051")
        return value

    @field_validator("store")
    @classmethod
    def _url(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            ValkeyAddress.parse(value.get_secret_value())
        return value

    @model_validator(mode="after")
    def _together(self) -> Settings:
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("tls_cert_file and tls_key_file go together")
        if self.store is not None and self.state_dir is not None:
            raise ValueError("state_dir and --store are two places for the same sessions: give one of them")
        if self.store is None and self.state_dir is None:
            alone = [
                name for name in _OF_STORED if getattr(self, name) != type(self).model_fields[name].default
            ]
            if alone:
                raise ValueError(
                    f"{alone[0]} is for sessions that are stored: give a --state-dir or a --store"
                )
        if self.store_password_file is not None and self.store is None:
            raise ValueError("store_password_file is for a --store, and there is none")
        if not _loopback(self.listen.rpartition(":")[0]) and not self.insecure and self.tls_cert_file is None:
            raise ValueError(
                f"listen {self.listen} can be reached by others: set tls_cert_file and tls_key_file, "
                "or --insecure to serve plaintext there"
            )
        return self

    @classmethod
    def load(cls, config: Path | None = None, **flags: Any) -> Settings:
        """Read the settings. `flags` that are None count as absent.

        Raises:
            pydantic.ValidationError: a value is malformed, unknown or out of range.
            ValueError: `config` is not TOML.
            FileNotFoundError: `config` does not exist.
        """
        if config is not None and not config.is_file():
            raise FileNotFoundError(f"no config file {config}")

        class Loaded(cls):  # type: ignore[valid-type, misc]
            @classmethod
            def settings_customise_sources(
                cls,
                settings_cls: type[BaseSettings],
                init_settings: PydanticBaseSettingsSource,
                env_settings: PydanticBaseSettingsSource,
                **_: PydanticBaseSettingsSource,
            ) -> tuple[PydanticBaseSettingsSource, ...]:
                sources = (init_settings, env_settings)
                return (
                    sources if config is None else (*sources, TomlConfigSettingsSource(settings_cls, config))
                )

        try:
            return Loaded(**{name: value for name, value in flags.items() if value is not None})
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{config} is not TOML: {error}") from error
