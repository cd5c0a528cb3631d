"""Baton's own metrics; vLLM's front end adds its `vllm:*` to the same registry."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from cluster.handoff_failure import HandoffFailure
from cluster.scheduler.life import Failure, Finish, Path

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)

CUT_SHORT = {Finish.ABORT: "aborted", Finish.ERROR: "failed"}
"""What requests count as that did not end by themselves."""


class RouterMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "baton_requests",
            "Requests that ended, by the way their prompt's KV came to the worker that decoded; or "
            "that were aborted by their client, or failed.",
            ["path"],
            registry=registry,
        )
        for path in (*Path, *CUT_SHORT.values()):
            self.requests.labels(path)
        self.placements = Counter(
            "baton_placements",
            "Placements of requests on workers, by the policy's reason.",
            ["reason"],
            registry=registry,
        )
        self.refused = Counter(
            "baton_requests_refused",
            "Requests that were not taken: the queue full, a promise not to be kept, no worker, "
            "a value that no worker can be sent.",
            ["reason"],
            registry=registry,
        )
        for failure in (Failure.QUEUE_FULL, Failure.SLO, Failure.NO_WORKER, Failure.INVALID):
            self.refused.labels(failure)
        self.handoffs_started = Counter(
            "baton_handoffs_started", "KV hand-offs begun.", registry=registry
        )
        self.handoffs_completed = Counter(
            "baton_handoffs_completed", "KV hand-offs adopted whole.", registry=registry
        )
        self.handoffs_failed = Counter(
            "baton_handoffs_failed",
            "KV hand-offs that did not arrive whole; the prompt was recomputed.",
            ["reason"],
            registry=registry,
        )
        for why in HandoffFailure:
            self.handoffs_failed.labels(why)
        self.handoff_bytes = Counter(
            "baton_handoff_bytes", "KV bytes adopted from another worker.", registry=registry
        )
        self.handoff_tokens = Counter(
            "baton_handoff_tokens", "Tokens whose KV was adopted.", registry=registry
        )
        self.handoff_held_tokens = Counter(
            "baton_handoff_held_tokens",
            "Tokens that were not sent, as the decode worker's prefix cache had them.",
            registry=registry,
        )
        self.exposed_seconds = Histogram(
            "baton_handoff_exposed_seconds",
            "From the decode leg's arrival to its KV being whole, or not to come any more: what "
            "computing did not hide.",
            buckets=SECONDS,
            registry=registry,
        )
        self.handoff_seconds = Histogram(
            "baton_handoff_seconds",
            "From a hand-off's opening to its last layer: the three parts below.",
            buckets=SECONDS,
            registry=registry,
        )
        self.credit_wait_seconds = Histogram(
            "baton_handoff_credit_wait_seconds",
            "From a hand-off's opening until the receiver had room for it, or it failed.",
            buckets=SECONDS,
            registry=registry,
        )
        self.first_layer_seconds = Histogram(
            "baton_handoff_first_layer_seconds",
            "From then until the first layer came: prefill computes.",
            buckets=SECONDS,
            registry=registry,
        )
        self.wire_seconds = Histogram(
            "baton_handoff_wire_seconds",
            "From a hand-off's first layer to its last, computing included.",
            buckets=SECONDS,
            registry=registry,
        )
        self.handoffs_by_transport = Counter(
            "baton_handoffs_by_transport",
            "KV hand-offs adopted, by how they came and instead of which configured transport.",
            ["transport", "instead_of"],
            registry=registry,
        )
        self.resumed = Counter(
            "baton_requests_resumed",
            "Requests that lost a worker and went on elsewhere.",
            registry=registry,
        )
        self.moved = Counter(
            "baton_requests_moved",
            "Running requests that left a draining worker, with their KV or to be computed again.",
            ["way"],
            registry=registry,
        )
        for way in ("kv", "recomputed"):
            self.moved.labels(way)
        self.workers = Gauge("baton_workers", "Workers in reach.", ["pool"], registry=registry)
        self.queued = Gauge(
            "baton_requests_queued", "Requests that wait for a worker.", registry=registry
        )
        self.others = Gauge(
            "baton_requests_of_other_routers",
            "Requests that other routers have on the workers, as far as this one knows.",
            registry=registry,
        )
