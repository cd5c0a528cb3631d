"""What the controller is told at its start."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ControllerSettings:
    cluster: str
    redis_url: str
    lease_s: float
    stuck_after_s: float
    preemption_notice_s: float
    model_path: str
    vllm_args: dict[str, list[str]]
    """By pool, as are the ranks that a worker has."""
    tensor_parallel: dict[str, int]
    handoff: dict[str, float]
    prefill_accelerator: str | None
    decode_accelerator: str | None
    worker_host: str = ""
    """Address that workers listen on; empty: their node's."""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> ControllerSettings:
        return ControllerSettings(**json.loads(text))
