"""A hand-off as a span. vLLM's `--otlp-traces-endpoint` turns it on: vLLM's front end, which is in
this process, then sets OpenTelemetry up and keeps the headers of a request's trace. Without that,
OpenTelemetry's spans record nothing."""

from __future__ import annotations

from collections.abc import Mapping

from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from vllm.tracing import SpanAttributes

from cluster.wire import worker_pb2

SPAN = "kv_handoff"


def trace_handoff(
    adopted: worker_pb2.Adopted,
    request_id: str,
    trace_headers: Mapping[str, str] | None,
    sender: str,
    receiver: str,
    ended_unix_s: float,
) -> None:
    """`request_id`: as vLLM's own span of the request has it. `trace_headers`: of the request, if
    it came with some; else the span is, like vLLM's, the root of a trace.

    The span lasts from the transfer's opening to its last layer or its failure, by the receiver's
    clock, and ends when the router hears of it. The three parts of its attributes add up to it;
    `exposed_s` is what of it computing did not hide.
    """
    parts_s = {
        "credit_wait_s": adopted.credit_wait_s,
        "first_layer_s": adopted.first_layer_s,
        "wire_s": adopted.wire_s,
    }
    context = TraceContextTextMapPropagator().extract(trace_headers or {})
    ended_unix_ns = int(ended_unix_s * 1e9)
    started_unix_ns = ended_unix_ns - round(sum(parts_s.values()) * 1e9)
    tracer = trace.get_tracer("baton.router")
    span = tracer.start_span(SPAN, context, start_time=started_unix_ns)
    if not span.is_recording():
        return
    result = "handed over" if adopted.handed_over else adopted.reason
    told: dict[str, str | float] = {
        "sender": sender,
        "receiver": receiver,
        "result": result,
        "transport": adopted.transport,
        "codec": adopted.codec,
        "bytes": adopted.bytes,
        "tokens": adopted.tokens,
        "layers": adopted.layers,
        "exposed_s": adopted.exposed_s,
        **parts_s,
    }
    if adopted.instead_of:
        told["instead_of"] = adopted.instead_of
    span.set_attribute(SpanAttributes.GEN_AI_REQUEST_ID, request_id)
    for name, value in told.items():
        span.set_attribute(f"baton.handoff.{name}", value)
    if not adopted.handed_over:
        span.set_status(trace.Status(trace.StatusCode.ERROR, result))
    span.end(ended_unix_ns)
