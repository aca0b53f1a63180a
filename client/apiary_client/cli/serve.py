"""`apiary serve`: start a worker. Flags are handed on as written; the worker's settings judge them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apiary_client.cli import console
from apiary_client.cli.server_extra import server_extra

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


def _flag(panel: str, metavar: str, default: str, help: str) -> Any:
    if default:
        help = f"{help} [dim]\\[default: {default}][/dim]"
    return typer.Option(metavar=metavar, show_default=False, help=help, rich_help_panel=panel)


_MODEL, _MEMORY, _SCHEDULING = "Model", "Memory", "Scheduling"
_NETWORK, _STATE, _TELEMETRY = "Network", "State", "Telemetry"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog=console.examples(
            "apiary serve",
            "apiary serve --listen 127.0.0.1:6000 --cache-budget 4GiB --policy 'buzz(window=300)'",
            "apiary serve --model ./my-llama --metrics-port 9464",
            "apiary serve --listen 0.0.0.0:50051 --tls-cert-file cert.pem --tls-key-file key.pem",
            "APIARY_CACHE_BUDGET=8GiB apiary serve --config worker.toml",
            "apiary serve --store 'valkey://10.0.0.7:6379/0?namespace=bees' --store-password-file password",
        )
    )(serve)


def serve(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Option(metavar="TOML", help="A file with these settings; flags and variables win.")
    ] = None,
    listen: Annotated[
        str | None, _flag(_NETWORK, "HOST:PORT", "127.0.0.1:50051", "Where to listen; port 0 picks one.")
    ] = None,
    insecure: Annotated[
        bool | None,
        typer.Option("--insecure", help="Plaintext where others can reach it.", rich_help_panel=_NETWORK),
    ] = None,
    tls_cert_file: Annotated[str | None, _flag(_NETWORK, "PEM", "", "The certificate chain.")] = None,
    tls_key_file: Annotated[str | None, _flag(_NETWORK, "PEM", "", "The certificate's key.")] = None,
    max_message_bytes: Annotated[
        str | None, _flag(_NETWORK, "SIZE", "8MiB", "The largest message to take.")
    ] = None,
    model: Annotated[
        str | None, _flag(_MODEL, "NAME|PATH", "smollm2-135m", "A pulled model, a directory or a hub id.")
    ] = None,
    weights: Annotated[str | None, _flag(_MODEL, "fp32|int8", "fp32", "Precision of the weights.")] = None,
    backend: Annotated[
        str | None,
        _flag(_MODEL, "auto|reference|cpu|cuda", "auto", "What computes: the fastest, or one by name."),
    ] = None,
    device: Annotated[str | None, _flag(_MODEL, "DEVICE", "cpu", "cpu, cuda, cuda:1, mps ...")] = None,
    dtype: Annotated[
        str | None, _flag(_MODEL, "float32|bfloat16|float16", "float32", "Data type of the computation.")
    ] = None,
    cache_dtype: Annotated[
        str | None,
        _flag(
            _MODEL,
            "float32|bfloat16|float16|int8",
            "float32",
            "Data type of the cache; int8 takes 28% of the memory of float32, and is the fastest.",
        ),
    ] = None,
    threads: Annotated[str | None, _flag(_MODEL, "N", "0", "Threads of torch; 0 lets torch choose.")] = None,
    cache_budget: Annotated[
        str | None, _flag(_MEMORY, "SIZE", "1GiB", "Memory for all caches; never exceeded.")
    ] = None,
    parked_budget: Annotated[
        str | None, _flag(_MEMORY, "SIZE", "4GiB", "Host memory for idle sessions that made room.")
    ] = None,
    policy: Annotated[
        str | None, _flag(_MEMORY, "SPEC", "buzz2", "Cache policy of sessions that name none.")
    ] = None,
    slack: Annotated[str | None, _flag(_MEMORY, "N", "64", "Entries a slot has beyond the bound.")] = None,
    workspaces: Annotated[str | None, _flag(_MEMORY, "N", "1", "Prefill workspaces.")] = None,
    workspace_entries: Annotated[
        str | None, _flag(_MEMORY, "N", "4096", "Entries of a prefill workspace.")
    ] = None,
    reserve_slots: Annotated[
        str | None, _flag(_MEMORY, "N", "1", "Slots that only running turns may take.")
    ] = None,
    max_sessions: Annotated[str | None, _flag(_MEMORY, "N", "10000", "Most sessions.")] = None,
    session_ttl: Annotated[
        str | None, _flag(_MEMORY, "SECONDS", "86400", "A session ends this long after its last turn.")
    ] = None,
    step_tokens: Annotated[str | None, _flag(_SCHEDULING, "N", "256", "Most tokens in a step.")] = None,
    max_running: Annotated[str | None, _flag(_SCHEDULING, "N", "64", "Most turns in flight.")] = None,
    decode_slowdown: Annotated[
        str | None,
        _flag(_SCHEDULING, "X", "2", "Most times longer that prompts may make a step of running answers."),
    ] = None,
    queue_limit: Annotated[str | None, _flag(_SCHEDULING, "N", "256", "Most turns that wait.")] = None,
    tenant_weights: Annotated[
        str | None,
        _flag(_SCHEDULING, "A=W,B=W", "", "Shares of tenants, e.g. bees=2,wasps=0.5; 1 where not named."),
    ] = None,
    max_prompt_tokens: Annotated[
        str | None, _flag(_SCHEDULING, "N", "131072", "The longest input of a turn.")
    ] = None,
    default_max_tokens: Annotated[
        str | None, _flag(_SCHEDULING, "N", "512", "Most tokens of an answer that names no limit.")
    ] = None,
    max_tokens: Annotated[
        str | None, _flag(_SCHEDULING, "N", "32768", "The largest limit that a request may name.")
    ] = None,
    stall_limit: Annotated[
        str | None, _flag(_SCHEDULING, "SECONDS", "30", "Drop a reader that takes nothing this long.")
    ] = None,
    stream_tokens: Annotated[
        str | None,
        _flag(_SCHEDULING, "N", "1024", "Tokens that wait for a slow reader; then it pauses."),
    ] = None,
    reattach_grace: Annotated[
        str | None,
        _flag(
            _SCHEDULING, "SECONDS", "10", "Run a turn with a request id on for so long without its reader."
        ),
    ] = None,
    step_limit: Annotated[
        str | None, _flag(_SCHEDULING, "SECONDS", "120", "A step that hangs this long ends the worker.")
    ] = None,
    drain_grace: Annotated[
        str | None, _flag(_SCHEDULING, "SECONDS", "20", "Time for running turns after SIGTERM.")
    ] = None,
    state_dir: Annotated[
        str | None,
        _flag(
            _STATE,
            "DIR",
            "",
            "Store sessions there, and take up those that are there; without it, or --store, they end.",
        ),
    ] = None,
    store: Annotated[
        str | None,
        _flag(
            _STATE,
            "URL",
            "",
            "Store sessions in a Valkey server instead: valkey://HOST:PORT/DB?namespace=NAME&lease=SECONDS "
            "(valkeys:// for TLS, with ca=FILE; unix:///PATH for a socket). A namespace (apiary unless said "
            "otherwise) is one worker's; another takes it over when that has been dead for the lease (10).",
        ),
    ] = None,
    store_password_file: Annotated[
        str | None, _flag(_STATE, "FILE", "", "Its password; in the URL others on this machine could see it.")
    ] = None,
    durability: Annotated[
        str | None,
        _flag(_STATE, "turn|idle|off", "turn", "Store caches after each turn, when idle, or nothing at all."),
    ] = None,
    snapshot_delay: Annotated[
        str | None, _flag(_STATE, "SECONDS", "30", "With --durability idle, how long that is.")
    ] = None,
    stored_budget: Annotated[
        str | None, _flag(_STATE, "SIZE", "16GiB", "Disk for stored caches; the oldest go first.")
    ] = None,
    checkpoints: Annotated[
        str | None, _flag(_STATE, "N", "0", "Earlier caches of a session to store: rewinds are quick then.")
    ] = None,
    store_patience: Annotated[
        str | None, _flag(_STATE, "SECONDS", "2", "How long an answer's end waits for a store that hangs.")
    ] = None,
    snapshot_bits: Annotated[
        str | None,
        _flag(
            _STATE,
            "2|4",
            "",
            "Store caches with all but their last 128 entries in so few bits. Smaller, but no longer exact: "
            "after a cache came back, answers may differ from those of an uninterrupted session.",
        ),
    ] = None,
    snapshot_key_file: Annotated[
        str | None, _flag(_STATE, "FILE", "", "Key that signs stored caches; others are refused.")
    ] = None,
    otlp_endpoint: Annotated[
        str | None, _flag(_TELEMETRY, "URL", "", "Send traces and metrics there (OTLP over gRPC).")
    ] = None,
    metrics_port: Annotated[str | None, _flag(_TELEMETRY, "PORT", "", "Serve Prometheus metrics.")] = None,
    log_level: Annotated[
        str | None, _flag(_TELEMETRY, "debug|info|warning|error", "info", "What to log.")
    ] = None,
    log_format: Annotated[
        str | None, _flag(_TELEMETRY, "auto|json|console", "auto", "How to log; auto asks the terminal.")
    ] = None,
) -> None:
    """Start a worker and serve one model until SIGTERM or Ctrl-C.

    Each setting can also be given as a variable (--cache-budget is APIARY_CACHE_BUDGET) or in the --config
    file (cache_budget = "1GiB"). Flags win over variables, variables over the file.
    """
    flags = {name: value for name, value in context.params.items() if name != "config"}
    with server_extra():
        from pydantic import ValidationError
        from pydantic_settings import SettingsError

        from apiary_server.settings import Settings

        try:
            settings = Settings.load(config=config, **flags)
        except ValidationError as error:
            for detail in error.errors():
                console.complain(_tell(detail, list(Settings.model_fields)))
            raise typer.Exit(2) from None
        except (FileNotFoundError, SettingsError, ValueError) as error:
            console.fail(str(error), code=2)

        from apiary_server.main import serve

        serve(settings)


def _tell(detail: ErrorDetails, settings: Sequence[str]) -> str:
    """Return one violation with the names of flags in place of fields."""
    if detail["type"] == "value_error":  # our own words, complete
        why = str(detail["ctx"]["error"])
    else:
        why = f"{detail['msg'][0].lower()}{detail['msg'][1:]}, got {detail['input']!r}"
    for name in settings:
        if "_" in name:
            why = re.sub(rf"\b{name}\b", _option(name), why)
    if not detail["loc"]:
        return why
    name = str(detail["loc"][0])
    if detail["type"] == "extra_forbidden":
        return f"{name} is no setting; `apiary serve --help` lists them all"
    return f"{_option(name)}: {why}"


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
