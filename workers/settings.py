"""What a worker is told at its start."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class HandoffSettings:
    inbox_bytes: int = 1 << 30
    """KV that may wait here for its decode leg."""
    staged_bytes: int = 256 << 20
    """KV that may wait here to be sent."""
    credit_deadline_s: float = 5.0
    """A transfer may wait this long for room in the inbox."""
    transfer_deadline_s: float = 60.0
    """For one transfer, from its first layer to the receiver's answer."""
    idle_s: float = 30.0
    """An untouched transfer is dropped after this time."""
    unclaimed_s: float = 3.0
    """So is one that has come whole, if it has no decode leg by then: its router is gone."""
    transport: Literal["auto", "grpc", "collective", "nixl"] = "grpc"
    """How payloads go to a worker that can take them so; else by gRPC."""
    codec: str = "none"
    """How KV is written that this worker sends: a name in workers/kv/codecs.py."""
    overlap: Literal["auto", "always", "never"] = "auto"
    """Whether layers are pushed while prefill computes, or all of them in one go after it."""
    one_go_ms: float = 20.0
    """auto: a transfer expected to take no longer goes in one go."""


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    worker_id: str
    incarnation: str
    vllm_args: list[str]
    """Arguments of `vllm serve`, the model among them."""
    host: str = "127.0.0.1"
    port: int = 0
    accelerator: str = ""
    cpu_ids: list[int] = field(default_factory=list)
    """Cores this worker keeps to; empty: all. vLLM's own choice puts every worker on the same."""
    handoff: HandoffSettings = HandoffSettings()
    stuck_after_s: float = 30.0
    """An engine that does nothing for this long while requests wait has to go."""

    # Membership; without a URL the worker is known only to whoever started it.
    redis_url: str = ""
    cluster: str = "baton"
    lease_s: float = 2.4
    started_unix_s: float = 0.0
    """By the clock of whoever starts it: the later one of two starts is the member."""
    preemption_notice_s: float = 0.0
    """Told to end by SIGTERM, it drains for that long; 0: it ends at once. For members only."""
    pool: str = "prefill"
    node: str = ""
    placement_reason: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> WorkerSettings:
        values = json.loads(text)
        return WorkerSettings(**{**values, "handoff": HandoffSettings(**values["handoff"])})
