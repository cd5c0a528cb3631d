"""Where a request goes. A policy sees the request and the workers, and names both of its workers
at once, as Splitwise has it (section IV-A): the hand-off's two ends are chosen together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.scheduler.view import ClusterView, Pool, WorkerKey, WorkerView


@dataclass(frozen=True, slots=True)
class Ask:
    """What a policy may know of a request."""

    request_id: str
    prompt_tokens: int
    max_tokens: int
    """Output tokens still to come, at most."""
    resumed_tokens: int = 0
    """Output tokens the client has already, to be computed again with the prompt."""
    can_hand_over: bool = True
    """False for work that has no decode phase, or whose output needs the prompt in one piece."""

    @property
    def tokens_to_compute(self) -> int:
        return self.prompt_tokens + self.resumed_tokens


@dataclass(frozen=True, slots=True)
class Placement:
    """`prefill` and `decode` are the same worker when nothing is handed over."""

    prefill: WorkerKey
    decode: WorkerKey
    reason: str

    @property
    def hands_over(self) -> bool:
        return self.prefill != self.decode


class PlacementPolicy(Protocol):
    def place(self, ask: Ask, view: ClusterView) -> Placement | None:
        """None: no worker can take it now."""
        ...


@dataclass(frozen=True, slots=True)
class JoinShortestQueue:
    """Splitwise's rule: prefill where the fewest prompt tokens wait, decode where memory and
    running tokens are least. A pool that has no worker left borrows from the other.

    `local_prompt_tokens`: prompts up to this length go straight to the decode worker; handing
    their KV over would cost more than it saves.
    """

    local_prompt_tokens: int = 0

    def place(self, ask: Ask, view: ClusterView) -> Placement | None:
        prefill = least(self._candidates(ask, view, Pool.PREFILL), prefill_queue)
        if prefill is None:
            return None
        if not ask.can_hand_over:
            return Placement(prefill.key, prefill.key, "nothing to hand over")
        if ask.max_tokens == 1:
            return Placement(prefill.key, prefill.key, "one token only")
        peers = [
            worker
            for worker in self._candidates(ask, view, Pool.DECODE)
            if worker.model == prefill.model
        ]
        decode = least(peers, decode_queue)
        if decode is None:
            return Placement(prefill.key, prefill.key, "no decode worker")
        if ask.tokens_to_compute <= self.local_prompt_tokens:
            return Placement(decode.key, decode.key, "short prompt")
        if decode is prefill:
            return Placement(prefill.key, prefill.key, "one worker only")
        return Placement(prefill.key, decode.key, "shortest queues")

    @staticmethod
    def _candidates(ask: Ask, view: ClusterView, pool: Pool) -> Sequence[WorkerView]:
        fitting = [
            worker
            for worker in view.available()
            if ask.tokens_to_compute < worker.max_model_len_tokens
        ]
        return [worker for worker in fitting if worker.pool is pool] or fitting


def prefill_queue(worker: WorkerView) -> tuple[float, ...]:
    return (worker.pending_prompt_tokens, worker.prefills, worker.kv_load)


def decode_queue(worker: WorkerView) -> tuple[float, ...]:
    # Memory first, in steps of a tenth: within one, the fewer running tokens decide.
    return (int(worker.kv_load * 10), worker.decode_tokens, worker.decodes)


def least(
    workers: Sequence[WorkerView], queue: Callable[[WorkerView], tuple[float, ...]]
) -> WorkerView | None:
    """The worker with the shortest queue; the key breaks ties, so decisions can be repeated."""
    return min(workers, key=lambda worker: (queue(worker), worker.key), default=None)
