"""Policies that give each worker a cost, and take the least."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from cluster.scheduler.handover import ALWAYS, HandOverRule
from cluster.scheduler.policy import Ask, PairPolicy, Pick
from cluster.scheduler.prediction import exposed_s, tpot_s, ttft_s
from cluster.scheduler.view import Pool, Pools, WorkerView

OUTPUT_TOKENS = 128
"""What an answer is taken to be long, if it may be longer."""


class Scored(PairPolicy):
    """Of the right pool's workers, those with room in their KV cache if there are any."""

    def pick_prefill(self, ask: Ask, pools: Pools) -> Pick | None:
        return _cheapest(ask, pools.labelled(Pool.PREFILL), self.prefill_cost)

    def pick_decode(self, ask: Ask, pools: Pools, prefill: Pick | None) -> Pick | None:
        workers = pools.labelled(Pool.DECODE)
        if prefill is not None:
            # A pool that borrows does not borrow the same worker, if there is another.
            workers = [w for w in workers if w is not prefill.worker] or workers
        return _cheapest(ask, workers, self.decode_cost)

    @abstractmethod
    def prefill_cost(self, ask: Ask, worker: WorkerView) -> float: ...

    @abstractmethod
    def decode_cost(self, ask: Ask, worker: WorkerView) -> float: ...


def _cheapest(
    ask: Ask, workers: list[WorkerView], cost: Callable[[Ask, WorkerView], float]
) -> Pick | None:
    fitting = [worker for worker in workers if worker.has_room(ask.tokens_to_compute)] or workers
    best = min(fitting, key=lambda worker: (cost(ask, worker), worker.key), default=None)
    return None if best is None else Pick(best)


@dataclass(frozen=True, slots=True)
class PrefixAware(Scored):
    """Cached blocks against load, both counted in tokens: prefill where the fewest tokens are to be
    computed until this prompt is done, decode where the fewest are held once it is there. So a
    prefix that everybody has in common does not draw everybody to one worker."""

    rule: HandOverRule = ALWAYS
    reason: ClassVar[str] = "prefix and load"

    def prefill_cost(self, ask: Ask, worker: WorkerView) -> float:
        return worker.pending_prompt_tokens + ask.tokens_to_compute_on(worker)

    def decode_cost(self, ask: Ask, worker: WorkerView) -> float:
        there = max(worker.decode_tokens, worker.kv_load * worker.kv_tokens)
        return there + ask.tokens_to_compute_on(worker)


@dataclass(frozen=True, slots=True)
class PredictedLatency(Scored):
    """The first token soonest; then the answer's other tokens, whose number is a guess."""

    rule: HandOverRule = ALWAYS
    reason: ClassVar[str] = "predicted latency"

    def prefill_cost(self, ask: Ask, worker: WorkerView) -> float:
        return ttft_s(ask, worker)

    def decode_cost(self, ask: Ask, worker: WorkerView) -> float:
        answer_s = tpot_s(worker) * min(ask.max_tokens, OUTPUT_TOKENS)
        return exposed_s(ask, worker) + worker.prefill_wait_s + answer_s
