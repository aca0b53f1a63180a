"""Metrics and traces, by the OpenTelemetry conventions for generative AI, from the engine's plain numbers.

Metrics go to an OTLP endpoint, to a Prometheus port, to both or nowhere; spans go to the OTLP endpoint. No
process-wide provider is set: whoever imports this chooses.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import PurePath
from wsgiref.simple_server import WSGIServer

from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client import CollectorRegistry, start_http_server

from apiary_server.engine.result import Capacity, Observer, StepStats, TurnStats
from apiary_server.settings import Settings

PROVIDER = "apiary"
_SUCCESS = ("stop", "length")
_EXPORT_TIMEOUT = 5.0  # seconds that a dead collector may hold up the end of the process

# The conventions' advice (https://github.com/open-telemetry/semantic-conventions-genai), in seconds.
_DURATION_BUCKETS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
)
_PER_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

# Of `Capacity`: field, instrument, unit, description.
_GAUGES = (
    ("budget_bytes", "apiary.pool.budget", "By", "The whole cache budget."),
    ("used_bytes", "apiary.pool.used", "By", "Cache bytes leased now."),
    ("peak_bytes", "apiary.pool.peak", "By", "The most cache bytes ever leased at once."),
    ("parked_bytes", "apiary.parked.used", "By", "Host memory that parked sessions hold."),
    ("sessions", "apiary.sessions", "{session}", "All sessions."),
    ("resident_sessions", "apiary.sessions.resident", "{session}", "Sessions in the pool."),
    ("parked_sessions", "apiary.sessions.parked", "{session}", "Sessions in host memory."),
    ("stored_bytes", "apiary.stored.used", "By", "Bytes of all snapshots of caches."),
    ("stored_sessions", "apiary.sessions.stored", "{session}", "Sessions whose cache has a snapshot."),
    ("running_turns", "apiary.turns.running", "{turn}", "Turns in flight."),
    ("queued_turns", "apiary.turns.queued", "{turn}", "Turns that wait: the queue's depth."),
    ("store_degraded", "apiary.store.degraded", "1", "1 while sessions or their caches cannot be stored."),
    ("unread_sessions", "apiary.store.unread", "{session}", "Stored sessions that cannot be read."),
)


@dataclass(frozen=True, slots=True)
class Origin:
    """What a turn's `trace` carries through the engine: the conventions' operation name, and the W3C Trace
    Context headers of its call."""

    operation: str = "chat"
    headers: Mapping[str, str] = field(default_factory=dict)


class Telemetry(Observer):
    """Turns the engine's stats into metrics and spans.

    Args:
        meters, tracers: the providers to record with; `shutdown` ends them.
        model: the conventions' `gen_ai.request.model`.
        server: the Prometheus endpoint, already listening, if there is one.
    """

    def __init__(
        self, meters: MeterProvider, tracers: TracerProvider, model: str, server: WSGIServer | None = None
    ) -> None:
        self._meters, self._tracers, self._model, self._server = meters, tracers, model, server
        self._tracer = tracers.get_tracer("apiary")
        meter = self._meter = meters.get_meter("apiary")
        self._duration = meter.create_histogram(
            "gen_ai.server.request.duration",
            "s",
            "Generative AI server request duration such as time-to-last byte or last output token.",
            explicit_bucket_boundaries_advisory=_DURATION_BUCKETS,
        )
        self._first_token = meter.create_histogram(
            "gen_ai.server.time_to_first_token",
            "s",
            "Time to generate first token for successful responses.",
            explicit_bucket_boundaries_advisory=_FIRST_TOKEN_BUCKETS,
        )
        self._per_token = meter.create_histogram(
            "gen_ai.server.time_per_output_token",
            "s",
            "Time per output token generated after the first token for successful responses.",
            explicit_bucket_boundaries_advisory=_PER_TOKEN_BUCKETS,
        )
        self._step = meter.create_histogram(
            "apiary.step.duration",
            "s",
            "Time of one forward pass with all that belongs to it.",
            explicit_bucket_boundaries_advisory=_STEP_BUCKETS,
        )
        self._tokens = meter.create_counter("apiary.tokens", "{token}", "Tokens computed, by phase.")
        self._compactions = meter.create_counter("apiary.compactions", "{compaction}", "Compactions.")
        self._evicted = meter.create_counter("apiary.evicted_entries", "{entry}", "Cache entries evicted.")

    @property
    def metrics_port(self) -> int | None:
        """The port that Prometheus can scrape, if there is one."""
        return None if self._server is None else self._server.server_port

    def watch(self, capacity: Callable[[], Capacity], moves: Callable[[], Mapping[str, int]]) -> None:
        """Have the gauges ask `capacity` and `moves` whenever they are read; both must be thread-safe."""
        for name, instrument, unit, description in _GAUGES:

            def read(_: CallbackOptions, name: str = name) -> Iterable[Observation]:
                yield Observation(int(getattr(capacity(), name)))

            self._meter.create_observable_gauge(instrument, [read], unit, description)

        def moved(_: CallbackOptions) -> Iterable[Observation]:
            for where, count in moves().items():
                yield Observation(count, {"apiary.move": where})

        self._meter.create_observable_counter(
            "apiary.cache.moves",
            [moved],
            "{move}",
            "Caches that were parked, unparked, saved, stored, loaded or lost.",
        )

    def step(self, stats: StepStats) -> None:
        """Count a step."""
        self._step.record(stats.duration)
        self._tokens.add(stats.prefill_tokens, {"apiary.phase": "prefill"})
        self._tokens.add(stats.decode_tokens, {"apiary.phase": "decode"})
        self._compactions.add(stats.compactions)
        self._evicted.add(stats.evicted_entries)

    def turn(self, stats: TurnStats) -> None:
        """Record a turn's times, and its span with one child for each phase that it reached."""
        origin = stats.trace if isinstance(stats.trace, Origin) else Origin()
        attributes = {
            "gen_ai.operation.name": origin.operation,
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": self._model,
        }
        success = stats.outcome in _SUCCESS
        failure = {} if success else {"error.type": stats.outcome}
        self._duration.record(stats.ended - stats.arrived, attributes | failure)
        if success and stats.first_token is not None:
            self._first_token.record(stats.first_token - stats.arrived, attributes)
            if stats.completion_tokens > 1:
                per_token = (stats.ended - stats.first_token) / (stats.completion_tokens - 1)
                self._per_token.record(per_token, attributes)
        self._trace(stats, origin, attributes | failure)

    def shutdown(self) -> None:
        """Export what is left, then stop."""
        self._tracers.shutdown()
        self._meters.shutdown(timeout_millis=_EXPORT_TIMEOUT * 1000)
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def _trace(self, stats: TurnStats, origin: Origin, attributes: dict[str, str]) -> None:
        offset = time.time() - time.monotonic()  # the wall clock of a monotonic time, as the clocks stand now

        def begin(name: str, start: float, parent: Span | None = None) -> Span:
            context = (
                TraceContextTextMapPropagator().extract(origin.headers)
                if parent is None
                else set_span_in_context(parent)
            )
            kind = SpanKind.SERVER if parent is None else SpanKind.INTERNAL
            return self._tracer.start_span(name, context, kind, start_time=round((start + offset) * 1e9))

        def end(span: Span, at: float) -> None:
            span.end(round((at + offset) * 1e9))

        span = begin(f"{origin.operation} {self._model}", stats.arrived)
        span.set_attributes(
            {
                **attributes,
                "gen_ai.usage.input_tokens": stats.prompt_tokens,
                "gen_ai.usage.output_tokens": stats.completion_tokens,
                "apiary.cached_tokens": stats.cached_tokens,
                "apiary.evicted_entries": stats.evicted_entries,
                "apiary.tenant": stats.tenant,
            }
        )
        if stats.session is not None:
            span.set_attribute("gen_ai.conversation.id", stats.session)
        if "error.type" in attributes:
            span.set_status(StatusCode.ERROR)
        else:
            span.set_attribute("gen_ai.response.finish_reasons", [stats.outcome])
        starts = {"queue": stats.arrived, "prefill": stats.started, "decode": stats.first_token}
        reached = [(phase, start) for phase, start in starts.items() if start is not None]
        ends = [start for _, start in reached[1:]] + [stats.ended]
        for (phase, start), at in zip(reached, ends, strict=True):
            end(begin(phase, start, span), at)
        end(span, stats.ended)


def build(settings: Settings) -> Telemetry:
    """Set up telemetry as the settings say.

    Raises:
        OSError: the metrics port cannot be taken.
    """
    resource = Resource.create(
        {
            "service.name": "apiary",
            "service.version": version("apiary"),
            "service.instance.id": str(uuid.uuid4()),
        }
    )
    readers: list[MetricReader] = []
    server: WSGIServer | None = None
    if settings.metrics_port is not None:
        registry = CollectorRegistry()
        readers.append(PrometheusMetricReader(registry=registry, scope_info_enabled=False))
        # as near or far as the service itself can be reached
        host = settings.listen.rpartition(":")[0].strip("[]")
        try:
            server, _ = start_http_server(settings.metrics_port, host, registry)
        except OSError as error:
            raise OSError(
                f"cannot serve metrics on {host}:{settings.metrics_port}: {error.strerror or error}"
            ) from error
    tracers = TracerProvider(resource=resource, shutdown_on_exit=False)
    if settings.otlp_endpoint is not None:
        insecure = not settings.otlp_endpoint.startswith("https://")
        readers.append(
            PeriodicExportingMetricReader(
                OTLPMetricExporter(settings.otlp_endpoint, insecure, timeout=_EXPORT_TIMEOUT)
            )
        )
        tracers.add_span_processor(
            BatchSpanProcessor(OTLPSpanExporter(settings.otlp_endpoint, insecure, timeout=_EXPORT_TIMEOUT))
        )
    meters = MeterProvider(readers, resource, shutdown_on_exit=False)
    # a path's last part: the whole of it is nobody's business
    return Telemetry(meters, tracers, PurePath(settings.model).name, server)
