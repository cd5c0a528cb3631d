"""When a vLLM server's steps gave requests their first tokens, as its scheduler notes it in a file
(cluster/bench/vllm_scheduler.py)."""

from __future__ import annotations

import json
from pathlib import Path

STEPS_VARIABLE = "BATON_BENCH_STEPS"
"""Names the file."""
SCHEDULER = "cluster.bench.vllm_scheduler.NotingScheduler"


def note_of(request_id: str, step_ended_s: float) -> str:
    return json.dumps([request_id, step_ended_s]) + "\n"


def first_token_steps(steps: Path) -> dict[str, float]:
    """When the step ended that computed a request's first token, by the request's id."""
    return dict(json.loads(line) for line in steps.read_text().splitlines())
