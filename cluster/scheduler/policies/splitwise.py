"""Splitwise's rules (section IV-A): join the shortest queue; under load, the mixed pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from cluster.scheduler.handover import ALWAYS, HandOverRule
from cluster.scheduler.policy import (
    DECODE_QUEUE,
    PREFILL_QUEUE,
    Ask,
    PairPolicy,
    Pick,
    Queue,
    shortest,
)
from cluster.scheduler.view import Pool, Pools, WorkerView


@dataclass(frozen=True, slots=True)
class Splitwise(PairPolicy):
    """Prefill where the fewest prompt tokens wait, decode where memory and running tokens are
    least. If even that queue is long, the mixed pool's shortest; if that is long as well, a worker
    of the other pool joins the mixed pool. It is back when it has no more of the other's work, and
    its pool keeps at least one worker that isn't mixed.

    `queue_threshold_tokens`: a prefill queue that this prompt would make longer is long, unless it
    is empty.
    """

    rule: HandOverRule = ALWAYS
    queue_threshold_tokens: int = 8192
    reason: ClassVar[str] = "shortest queues"

    def pick_prefill(self, ask: Ask, pools: Pools) -> Pick | None:
        pick = self._join(ask, pools.prefill, pools.mixed, PREFILL_QUEUE, Pool.PREFILL)
        if pick is not None:
            return pick
        drawn = shortest(pools.decode, PREFILL_QUEUE)
        if drawn is not None and _is_spare(drawn, pools.decode) and _has_room(drawn, ask):
            return Pick(drawn, "drawn from the decode pool", lends=True)
        return _make_do(pools.prefill, pools.mixed, pools.decode, PREFILL_QUEUE, Pool.PREFILL)

    def pick_decode(self, ask: Ask, pools: Pools, prefill: Pick | None) -> Pick | None:
        own, mixed, others = pools.decode, pools.mixed, pools.prefill
        if prefill is not None and prefill.lends and not prefill.worker.mixed:
            own = [worker for worker in own if worker is not prefill.worker]
            mixed = [*mixed, prefill.worker]
        pick = self._join(ask, own, mixed, DECODE_QUEUE, Pool.DECODE)
        if pick is not None:
            return pick
        drawable = [w for w in others if prefill is None or w is not prefill.worker]
        drawn = shortest(drawable, DECODE_QUEUE)
        if drawn is not None and _is_spare(drawn, others) and _has_room(drawn, ask):
            return Pick(drawn, "drawn from the prefill pool", lends=True)
        return _make_do(own, mixed, others, DECODE_QUEUE, Pool.DECODE)

    def _join(
        self,
        ask: Ask,
        own: list[WorkerView],
        mixed: list[WorkerView],
        queues: Sequence[Queue],
        pool: Pool,
    ) -> Pick | None:
        """The shortest queue of the pool, or else of the mixed pool. None if both are long."""
        for workers, reason in ((own, ""), (mixed, "mixed pool")):
            worker = shortest(workers, queues)
            if worker is not None and not self._is_long(worker, ask, pool):
                return Pick(worker, reason, lends=worker.pool is not pool)
        return None

    def _is_long(self, worker: WorkerView, ask: Ask, pool: Pool) -> bool:
        if pool is Pool.DECODE:
            return not _has_room(worker, ask)
        waiting = worker.pending_prompt_tokens
        return waiting > 0 and waiting + ask.tokens_to_compute > self.queue_threshold_tokens


def _is_spare(worker: WorkerView, pool: list[WorkerView]) -> bool:
    return sum(peer.model == worker.model for peer in pool) > 1


def _has_room(worker: WorkerView, ask: Ask) -> bool:
    return worker.has_room(ask.tokens_to_compute)


def _make_do(
    own: list[WorkerView],
    mixed: list[WorkerView],
    others: list[WorkerView],
    queues: Sequence[Queue],
    pool: Pool,
) -> Pick | None:
    """All queues are long and nobody can be drawn. A pool without any worker borrows the other's,
    which lends nothing by it: they do everything."""
    worker = shortest([*own, *mixed], queues)
    if worker is not None:
        return Pick(worker, "all queues are long", lends=worker.pool is not pool)
    worker = shortest(others, queues)
    return None if worker is None else Pick(worker)
