"""One span a hand-off, within the request's trace if it has one."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider, sampling
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from cluster.wire import worker_pb2
from router.tracing import trace_handoff

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
UNSAMPLED = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-00"}
ENDED_UNIX_S = 1_700_000_000.0
ADOPTED = worker_pb2.Adopted(
    handed_over=True,
    bytes=4096,
    tokens=16,
    layers=3,
    transport="collective",
    codec="int8",
    credit_wait_s=0.25,
    first_layer_s=0.5,
    wire_s=1.0,
    exposed_s=0.125,
)


@pytest.fixture
def provider() -> TracerProvider:
    return TracerProvider()


@pytest.fixture
def exporter(provider: TracerProvider) -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with mock.patch.object(trace, "get_tracer", provider.get_tracer):
        yield exporter


def only_span(exporter: InMemorySpanExporter) -> ReadableSpan:
    (span,) = exporter.get_finished_spans()
    return span


def test_a_span_tells_all_of_a_hand_off_and_its_parts_add_up(
    exporter: InMemorySpanExporter,
) -> None:
    trace_handoff(ADOPTED, "cmpl-1", HEADERS, "prefill-0/a", "decode-0/b", ENDED_UNIX_S)
    span = only_span(exporter)
    assert span.name == "kv_handoff"
    assert span.context is not None and span.parent is not None
    assert (span.context.trace_id, span.parent.span_id) == (int(TRACE_ID, 16), int(PARENT_ID, 16))
    assert span.attributes == {
        "gen_ai.request.id": "cmpl-1",
        "baton.handoff.sender": "prefill-0/a",
        "baton.handoff.receiver": "decode-0/b",
        "baton.handoff.result": "handed over",
        "baton.handoff.transport": "collective",
        "baton.handoff.codec": "int8",
        "baton.handoff.bytes": 4096,
        "baton.handoff.tokens": 16,
        "baton.handoff.layers": 3,
        "baton.handoff.credit_wait_s": 0.25,
        "baton.handoff.first_layer_s": 0.5,
        "baton.handoff.wire_s": 1.0,
        "baton.handoff.exposed_s": 0.125,
    }
    assert span.start_time is not None and span.end_time == int(ENDED_UNIX_S * 1e9)
    assert span.end_time - span.start_time == int((0.25 + 0.5 + 1.0) * 1e9)
    assert span.status.is_ok


def test_a_fall_back_tells_which_transport_could_not_be_used(
    exporter: InMemorySpanExporter,
) -> None:
    fell_back = worker_pb2.Adopted(handed_over=True, transport="grpc", instead_of="nixl")
    trace_handoff(fell_back, "cmpl-1", HEADERS, "p", "d", ENDED_UNIX_S)
    attributes = only_span(exporter).attributes
    assert attributes is not None
    assert attributes["baton.handoff.transport"] == "grpc"
    assert attributes["baton.handoff.instead_of"] == "nixl"


def test_a_failed_hand_off_is_an_error_with_its_reason(exporter: InMemorySpanExporter) -> None:
    reason = "the inbox had no room for it within 5 s"
    adopted = worker_pb2.Adopted(reason=reason, credit_wait_s=5, exposed_s=4.5, transport="grpc")
    trace_handoff(adopted, "cmpl-1", HEADERS, "p", "d", ENDED_UNIX_S)
    span = only_span(exporter)
    assert not span.status.is_ok
    assert span.status.description == reason
    assert span.attributes is not None
    told = {name.removeprefix("baton.handoff."): value for name, value in span.attributes.items()}
    assert (told["result"], told["transport"], told["exposed_s"]) == (reason, "grpc", 4.5)
    assert span.start_time is not None and span.end_time == int(ENDED_UNIX_S * 1e9)
    assert span.end_time - span.start_time == int(5e9)


def test_a_request_that_came_without_a_trace_begins_one(exporter: InMemorySpanExporter) -> None:
    with trace.use_span(trace.NonRecordingSpan(trace.SpanContext(7, 7, is_remote=False))):
        # Of whatever else this process is doing.
        trace_handoff(ADOPTED, "cmpl-1", None, "p", "d", ENDED_UNIX_S)
    span = only_span(exporter)
    assert span.parent is None
    assert span.attributes is not None and span.attributes["gen_ai.request.id"] == "cmpl-1"


@pytest.mark.parametrize("headers", [HEADERS, UNSAMPLED, None])
def test_the_sampler_decides(
    exporter: InMemorySpanExporter,
    provider: TracerProvider,
    headers: dict[str, str] | None,
) -> None:
    provider.sampler = sampling.ParentBased(sampling.ALWAYS_OFF)
    trace_handoff(ADOPTED, "cmpl-1", headers, "p", "d", ENDED_UNIX_S)
    assert len(exporter.get_finished_spans()) == (headers is HEADERS)
