"""What the engine's numbers become: metrics in memory and on a Prometheus port, spans, OTLP."""

from __future__ import annotations

import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
from opentelemetry import metrics, trace
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as metrics_pb2
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import (
    MetricsServiceServicer,
    add_MetricsServiceServicer_to_server,
)
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as trace_pb2
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client.parser import text_string_to_metric_families

from apiary_server.engine.result import Capacity, StepStats, TurnStats
from apiary_server.settings import Settings
from apiary_server.telemetry import Origin, Telemetry, build

CAPACITY = Capacity(*range(100, 116))
STEP = StepStats(
    duration=0.03,
    prefill_tokens=10,
    decode_tokens=3,
    compactions=2,
    evicted_entries=40,
    running_turns=4,
    queued_turns=1,
    used_bytes=1000,
    parked_bytes=0,
    resident_sessions=2,
    sessions=3,
)
COMMON = {"gen_ai.provider.name": "apiary", "gen_ai.request.model": "bees"}


def turn(outcome: str = "stop", **changes: Any) -> TurnStats:
    """A turn that waited 0.5 s, prefilled for 1 s and decoded 5 tokens in 2 s."""
    now = time.monotonic()
    stats: dict[str, Any] = {
        "tenant": "hive",
        "session": "s1",
        "outcome": outcome,
        "arrived": now - 3.5,
        "started": now - 3.0,
        "first_token": now - 2.0,
        "ended": now,
        "prompt_tokens": 7,
        "cached_tokens": 11,
        "completion_tokens": 5,
        "evicted_entries": 13,
        "trace": Origin("text_completion"),
    }
    return TurnStats(**(stats | changes))


class Recorder:
    """A Telemetry that keeps all in memory."""

    def __init__(self) -> None:
        self.reader, self.exporter = InMemoryMetricReader(), InMemorySpanExporter()
        tracers = TracerProvider(shutdown_on_exit=False)
        tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.telemetry = Telemetry(MeterProvider([self.reader], shutdown_on_exit=False), tracers, "bees")

    def points(self, name: str) -> list[Any]:
        """The points of a metric; none if it was never recorded."""
        data = self.reader.get_metrics_data()
        scopes = [scope for one in data.resource_metrics for scope in one.scope_metrics] if data else []
        return [
            point
            for scope in scopes
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        ]

    def spans(self) -> dict[str, ReadableSpan]:
        """The finished spans by name."""
        return {span.name: span for span in self.exporter.get_finished_spans()}


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    """A recorder, ended after the test."""
    one = Recorder()
    yield one
    one.telemetry.shutdown()


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        ("gen_ai.server.request.duration", 3.5),
        ("gen_ai.server.time_to_first_token", 1.5),
        ("gen_ai.server.time_per_output_token", 0.5),
    ],
)
def test_times_of_a_turn(recorder: Recorder, name: str, seconds: float) -> None:
    recorder.telemetry.turn(turn())
    (point,) = recorder.points(name)
    assert point.sum == pytest.approx(seconds)
    assert point.count == 1
    assert point.attributes == COMMON | {"gen_ai.operation.name": "text_completion"}
    assert len(point.explicit_bounds) >= 13
    assert 0.001 <= point.explicit_bounds[0] <= 0.01


@pytest.mark.parametrize("outcome", ["Cancelled", "DeadlineExceeded"])
def test_a_failed_turn_has_a_duration_and_its_error(recorder: Recorder, outcome: str) -> None:
    recorder.telemetry.turn(turn(outcome))
    (point,) = recorder.points("gen_ai.server.request.duration")
    assert point.attributes["error.type"] == outcome
    assert recorder.points("gen_ai.server.time_to_first_token") == []
    assert recorder.points("gen_ai.server.time_per_output_token") == []


def test_one_token_has_no_time_per_token(recorder: Recorder) -> None:
    recorder.telemetry.turn(turn(completion_tokens=1))
    assert len(recorder.points("gen_ai.server.time_to_first_token")) == 1
    assert recorder.points("gen_ai.server.time_per_output_token") == []


def test_steps(recorder: Recorder) -> None:
    recorder.telemetry.step(STEP)
    recorder.telemetry.step(STEP)
    (duration,) = recorder.points("apiary.step.duration")
    assert (duration.count, duration.sum) == (2, pytest.approx(0.06))
    tokens = {point.attributes["apiary.phase"]: point.value for point in recorder.points("apiary.tokens")}
    assert tokens == {"prefill": 20, "decode": 6}
    assert [point.value for point in recorder.points("apiary.compactions")] == [4]
    assert [point.value for point in recorder.points("apiary.evicted_entries")] == [80]


def test_gauges_ask_when_they_are_read(recorder: Recorder) -> None:
    capacities = [CAPACITY]
    recorder.telemetry.watch(lambda: capacities[-1], lambda: {"parked": 3})
    assert [point.value for point in recorder.points("apiary.pool.used")] == [CAPACITY.used_bytes]
    capacities.append(Capacity(*range(200, 216)))
    assert [point.value for point in recorder.points("apiary.pool.used")] == [201]
    assert [point.value for point in recorder.points("apiary.turns.queued")] == [214]
    assert [point.value for point in recorder.points("apiary.sessions")] == [212]


def test_spans_of_a_turn(recorder: Recorder) -> None:
    before = time.time_ns()
    recorder.telemetry.turn(turn())
    spans = recorder.spans()
    whole = spans.pop("text_completion bees")
    assert set(spans) == {"queue", "prefill", "decode"}
    assert whole.kind is SpanKind.SERVER
    assert whole.parent is None
    assert whole.status.status_code is StatusCode.UNSET
    assert whole.attributes == COMMON | {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.conversation.id": "s1",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 5,
        "apiary.cached_tokens": 11,
        "apiary.evicted_entries": 13,
        "apiary.tenant": "hive",
    }
    assert whole.end_time == pytest.approx(before, abs=1e9)  # by the wall clock
    for name, start, end in (("queue", 0.0, 0.5), ("prefill", 0.5, 1.5), ("decode", 1.5, 3.5)):
        span = spans[name]
        assert span.parent is not None
        assert span.parent.span_id == whole.context.span_id
        assert (span.start_time - whole.start_time) / 1e9 == pytest.approx(start, abs=1e-3)
        assert (span.end_time - whole.start_time) / 1e9 == pytest.approx(end, abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "phases"),
    [({"started": None, "first_token": None}, {"queue"}), ({"first_token": None}, {"queue", "prefill"})],
)
def test_a_turn_that_ended_early(recorder: Recorder, changes: dict[str, Any], phases: set[str]) -> None:
    recorder.telemetry.turn(turn("Cancelled", session=None, **changes))
    spans = recorder.spans()
    whole = spans.pop("text_completion bees")
    assert set(spans) == phases
    assert max(span.end_time for span in spans.values()) == whole.end_time
    assert whole.status.status_code is StatusCode.ERROR
    assert whole.attributes["error.type"] == "Cancelled"
    assert "gen_ai.conversation.id" not in whole.attributes


def test_the_callers_trace_goes_on(recorder: Recorder) -> None:
    trace_id, span_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    headers = {"traceparent": f"00-{trace_id}-{span_id}-01", "tracestate": "a=b"}
    recorder.telemetry.turn(turn(trace=Origin("chat", headers)))
    spans = recorder.spans()
    assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {trace_id}
    parent = spans["chat bees"].parent
    assert parent is not None
    assert f"{parent.span_id:016x}" == span_id
    assert parent.trace_state["a"] == "b"


@pytest.mark.parametrize("headers", [{"traceparent": "noise"}, {"traceparent": ""}, {"tracestate": "a=b"}])
def test_a_malformed_trace_header_begins_a_new_trace(recorder: Recorder, headers: dict[str, str]) -> None:
    recorder.telemetry.turn(turn(trace=Origin("chat", headers)))
    assert recorder.spans()["chat bees"].parent is None


def test_a_turn_without_an_origin(recorder: Recorder) -> None:
    recorder.telemetry.turn(turn(trace=None))
    assert "chat bees" in recorder.spans()


def test_prometheus() -> None:
    telemetry = build(Settings(listen="127.0.0.1:0", metrics_port=0, model="/models/smollm2-135m/"))
    try:
        telemetry.watch(lambda: CAPACITY, dict)
        telemetry.turn(turn())
        telemetry.step(STEP)
        url = f"http://127.0.0.1:{telemetry.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=5) as response:
            text = response.read().decode()
    finally:
        telemetry.shutdown()
    samples = {
        sample.name: sample for family in text_string_to_metric_families(text) for sample in family.samples
    }
    assert samples["gen_ai_server_time_to_first_token_seconds_count"].value == 1
    duration = samples["gen_ai_server_request_duration_seconds_sum"]
    assert duration.labels["gen_ai_request_model"] == "smollm2-135m"
    assert samples["apiary_pool_used_bytes"].value == CAPACITY.used_bytes
    assert samples["apiary_turns_queued"].value == CAPACITY.queued_turns
    assert samples["apiary_step_duration_seconds_count"].value == 1
    assert samples["apiary_compactions_total"].value == 2
    assert "hive" not in text  # tenants would make the number of series boundless
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url, timeout=5)


def test_no_exporter_and_no_global_provider() -> None:
    before = trace.get_tracer_provider(), metrics.get_meter_provider()
    telemetry = build(Settings())
    telemetry.turn(turn())
    telemetry.step(STEP)
    assert telemetry.metrics_port is None
    telemetry.shutdown()
    assert (trace.get_tracer_provider(), metrics.get_meter_provider()) == before


class Collector(TraceServiceServicer, MetricsServiceServicer):
    """An OTLP collector that keeps what it gets."""

    def __init__(self) -> None:
        self.spans: list[str] = []
        self.metrics: list[str] = []
        self.resource: dict[str, str] = {}
        self.got = threading.Event()

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:
        if isinstance(request, trace_pb2.ExportTraceServiceRequest):
            for resource in request.resource_spans:
                self.resource = {one.key: one.value.string_value for one in resource.resource.attributes}
                self.spans += [span.name for scope in resource.scope_spans for span in scope.spans]
            return trace_pb2.ExportTraceServiceResponse()
        for resource in request.resource_metrics:
            self.metrics += [metric.name for scope in resource.scope_metrics for metric in scope.metrics]
        return metrics_pb2.ExportMetricsServiceResponse()


@pytest.mark.parametrize("scheme", ["http://", ""])
def test_otlp(scheme: str) -> None:
    collector = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    add_TraceServiceServicer_to_server(collector, server)
    add_MetricsServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        telemetry = build(Settings(otlp_endpoint=f"{scheme}127.0.0.1:{port}"))
        telemetry.turn(turn())
        telemetry.shutdown()
    finally:
        server.stop(0)
    assert set(collector.spans) == {"text_completion smollm2-135m", "queue", "prefill", "decode"}
    assert "gen_ai.server.request.duration" in collector.metrics
    assert collector.resource["service.name"] == "apiary"
    assert collector.resource["service.instance.id"]


def test_a_dead_collector_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apiary_server.telemetry._EXPORT_TIMEOUT", 1.0)
    telemetry = build(Settings(otlp_endpoint="127.0.0.1:1"))
    telemetry.turn(turn())
    began = time.monotonic()
    telemetry.shutdown()
    assert time.monotonic() - began < 5
