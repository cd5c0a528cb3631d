"""What a router is told at its start."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from cluster.scheduler.handover import HandOver


@dataclass(frozen=True, slots=True)
class RouterSettings:
    router_id: str
    cluster: str
    redis_url: str
    host: str
    port: int
    url: str
    """Where clients of this machine reach it."""
    vllm_args: list[str]
    """Arguments of `vllm serve`, the model among them: the same as the workers'."""
    lease_s: float
    policy: str
    local_prompt_tokens: int
    queue_threshold_tokens: int
    hand_over: HandOver
    """What `handoff.when` says."""
    queue_deadline_s: float
    queue_max: int
    worker_requests_max: int
    slo_classes: dict[str, dict[str, Any]]
    """What `SloClass` is made of, by name."""
    api_key_classes: dict[str, str]
    """Names of classes, by the SHA-256 of API keys."""
    adopt_deadline_s: float

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> RouterSettings:
        return RouterSettings(**json.loads(text))
