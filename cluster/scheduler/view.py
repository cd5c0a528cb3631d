"""What the scheduler knows of the workers."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field


class Pool(enum.StrEnum):
    """A label the scheduler gives: every worker can do both kinds of work."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True, order=True)
class WorkerKey:
    """One start of one worker. What an older start said or was told no longer counts."""

    worker_id: str
    incarnation: str

    def __str__(self) -> str:
        return f"{self.worker_id}/{self.incarnation}"


@dataclass(slots=True)
class WorkerView:
    key: WorkerKey
    pool: Pool
    model: str
    """Fingerprint of the model: KV goes only between workers of one."""
    max_model_len_tokens: int
    kv_tokens: int
    """Tokens that its KV cache holds."""
    draining: bool = False

    # What this router placed there and has not seen done.
    pending_prompt_tokens: int = 0
    prefills: int = 0
    decodes: int = 0
    decode_tokens: int = 0
    """Context tokens of the requests decoding there."""

    # What the worker said last; other routers' work is in it.
    reported_running: int = 0
    reported_waiting: int = 0
    reported_kv_usage: float = 0.0

    @property
    def kv_load(self) -> float:
        """Share of the KV cache in use or promised, whichever figure is ahead."""
        promised = (self.decode_tokens + self.pending_prompt_tokens) / max(1, self.kv_tokens)
        return max(promised, self.reported_kv_usage)


@dataclass(slots=True)
class ClusterView:
    workers: dict[WorkerKey, WorkerView] = field(default_factory=dict)

    def available(self) -> Iterator[WorkerView]:
        """Workers that may be given new work."""
        return (worker for worker in self.workers.values() if not worker.draining)

    def pool(self, pool: Pool) -> list[WorkerView]:
        return [worker for worker in self.available() if worker.pool is pool]
