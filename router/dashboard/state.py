"""What the operator's page shows, as plain data: the page and its tests need no cluster."""

from __future__ import annotations

from dataclasses import dataclass, field

RECENT_HANDOFFS = 20
RECENT_FIRST_TOKENS = 20


@dataclass(frozen=True, slots=True)
class WorkerRow:
    worker_id: str
    incarnation: str
    pool: str
    state: str
    address: str
    node: str
    accelerator: str
    placement_reason: str
    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    """Share of its KV cache in use, 0 to 1."""
    inbox_bytes: int = 0
    handoffs_in: int = 0
    handoffs_out: int = 0
    handoff_bytes_in: int = 0
    detail: str = ""
    """Why it failed or has no part in hand-offs, if so."""


@dataclass(frozen=True, slots=True)
class HandoffRow:
    at_unix_s: float
    request_id: str
    sender: str
    receiver: str
    tokens: int
    bytes: int
    exposed_s: float
    wire_s: float
    result: str
    """`handed over`, or why it was recomputed."""
    credit_wait_s: float = 0.0
    first_layer_s: float = 0.0
    transport: str = ""
    codec: str = ""


@dataclass(frozen=True, slots=True)
class FirstTokenRow:
    """A request's first token. The page does not show it: `baton bench` reads it."""

    request_id: str
    step_ended_monotonic_s: float
    """By the worker's clock, which is this machine's if the worker is on it."""
    forwarded_monotonic_s: float
    """By the router's clock."""


@dataclass(frozen=True, slots=True)
class DashboardState:
    cluster: str
    model: str
    router_id: str
    version: str
    uptime_s: float
    workers: list[WorkerRow] = field(default_factory=list)
    desired: dict[str, int] = field(default_factory=dict)
    """Workers wanted, by pool."""
    requests_by_path: dict[str, int] = field(default_factory=dict)
    """Requests that ended: handed_over, kept_local, recomputed."""
    requests_running: int = 0
    requests_queued: int = 0
    handoffs_started: int = 0
    handoffs_completed: int = 0
    handoffs_failed: int = 0
    handoff_bytes: int = 0
    recent_handoffs: list[HandoffRow] = field(default_factory=list)
    """The newest first, RECENT_HANDOFFS at most."""
    recent_first_tokens: list[FirstTokenRow] = field(default_factory=list)
    """The newest first, RECENT_FIRST_TOKENS at most."""
    redis_reachable: bool = True
