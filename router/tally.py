"""Hand-offs and requests, counted once, for the metrics and for the operator's page."""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass, field

from cluster.scheduler.life import Finish, Path
from cluster.wire import worker_pb2
from router.dashboard.state import (
    RECENT_FIRST_TOKENS,
    RECENT_HANDOFFS,
    FirstTokenRow,
    HandoffRow,
)
from router.metrics import CUT_SHORT, RouterMetrics


@dataclass(slots=True)
class Tally:
    metrics: RouterMetrics
    by_path: Counter[Path] = field(default_factory=Counter)
    handoffs_started: int = 0
    handoffs_completed: int = 0
    handoffs_failed: int = 0
    handoff_bytes: int = 0
    recent: deque[HandoffRow] = field(default_factory=lambda: deque(maxlen=RECENT_HANDOFFS))
    first_tokens: deque[FirstTokenRow] = field(
        default_factory=lambda: deque(maxlen=RECENT_FIRST_TOKENS)
    )

    def request_ended(self, finish: Finish, path: Path) -> None:
        """It has been taken: one that is refused has no end to count."""
        if finish in CUT_SHORT:
            self.metrics.requests.labels(CUT_SHORT[finish]).inc()
            return
        self.by_path[path] += 1
        self.metrics.requests.labels(path).inc()

    def first_token(self, request_id: str, step_ended_s: float, forwarded_s: float) -> None:
        self.first_tokens.appendleft(FirstTokenRow(request_id, step_ended_s, forwarded_s))

    def handoff_started(self) -> None:
        self.handoffs_started += 1
        self.metrics.handoffs_started.inc()

    def handoff_ended(
        self, adopted: worker_pb2.Adopted, request_id: str, sender: str, receiver: str
    ) -> None:
        self.metrics.exposed_seconds.observe(adopted.exposed_s)
        # One that nobody opened waited for no room.
        if adopted.handed_over or adopted.transport:
            self.metrics.credit_wait_seconds.observe(adopted.credit_wait_s)
        if adopted.handed_over:
            self.handoffs_completed += 1
            self.handoff_bytes += adopted.bytes
            self.metrics.handoffs_completed.inc()
            self.metrics.handoff_bytes.inc(adopted.bytes)
            self.metrics.handoff_tokens.inc(adopted.tokens)
            self.metrics.handoff_held_tokens.inc(adopted.held_tokens)
            parts_s = (adopted.credit_wait_s, adopted.first_layer_s, adopted.wire_s)
            self.metrics.handoff_seconds.observe(sum(parts_s))
            self.metrics.first_layer_seconds.observe(adopted.first_layer_s)
            self.metrics.wire_seconds.observe(adopted.wire_s)
            self.metrics.handoffs_by_transport.labels(adopted.transport, adopted.instead_of).inc()
        else:
            self.handoffs_failed += 1
            self.metrics.handoffs_failed.labels(adopted.failure).inc()
        self.recent.appendleft(
            HandoffRow(
                at_unix_s=time.time(),
                request_id=request_id,
                sender=sender,
                receiver=receiver,
                tokens=adopted.tokens,
                bytes=adopted.bytes,
                exposed_s=adopted.exposed_s,
                wire_s=adopted.wire_s,
                result="handed over" if adopted.handed_over else adopted.reason,
                credit_wait_s=adopted.credit_wait_s,
                first_layer_s=adopted.first_layer_s,
                transport=adopted.transport,
                codec=adopted.codec,
            )
        )
