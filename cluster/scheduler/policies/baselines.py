"""Simple policies, to compare with. None looks at more than the workers of the right pool."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections import Counter
from dataclasses import dataclass, field
from typing import ClassVar

from cluster.scheduler.handover import ALWAYS, HandOverRule
from cluster.scheduler.policy import (
    DECODE_QUEUE,
    PREFILL_QUEUE,
    Ask,
    PairPolicy,
    Pick,
    shortest,
)
from cluster.scheduler.view import Pool, Pools, WorkerView


class Baseline(PairPolicy):
    def pick_prefill(self, ask: Ask, pools: Pools) -> Pick | None:
        return self._pick(pools.labelled(Pool.PREFILL), Pool.PREFILL)

    def pick_decode(self, ask: Ask, pools: Pools, prefill: Pick | None) -> Pick | None:
        workers = pools.labelled(Pool.DECODE)
        if prefill is not None:
            # A pool that borrows does not borrow the same worker, if there is another.
            workers = [w for w in workers if w is not prefill.worker] or workers
        return self._pick(workers, Pool.DECODE)

    def _pick(self, workers: list[WorkerView], pool: Pool) -> Pick | None:
        return Pick(self.choose(workers, pool)) if workers else None

    @abstractmethod
    def choose(self, workers: list[WorkerView], pool: Pool) -> WorkerView:
        """`workers` is not empty."""


@dataclass(slots=True)
class RoundRobin(Baseline):
    """Each pool's workers in turn."""

    rule: HandOverRule = ALWAYS
    _turns: Counter[Pool] = field(default_factory=Counter)

    reason: ClassVar[str] = "round robin"

    def choose(self, workers: list[WorkerView], pool: Pool) -> WorkerView:
        turn = self._turns[pool]
        self._turns[pool] = turn + 1
        return workers[turn % len(workers)]


@dataclass(slots=True)
class Random(Baseline):
    rng: random.Random
    rule: HandOverRule = ALWAYS

    reason: ClassVar[str] = "random"

    def choose(self, workers: list[WorkerView], pool: Pool) -> WorkerView:
        return self.rng.choice(workers)


@dataclass(slots=True)
class PowerOfTwo(Baseline):
    """Of two workers drawn at random the one with the shorter queue (Mitzenmacher, 2001)."""

    rng: random.Random
    rule: HandOverRule = ALWAYS

    reason: ClassVar[str] = "shorter of two queues"

    def choose(self, workers: list[WorkerView], pool: Pool) -> WorkerView:
        two = self.rng.sample(workers, 2) if len(workers) > 1 else workers
        chosen = shortest(two, PREFILL_QUEUE if pool is Pool.PREFILL else DECODE_QUEUE)
        assert chosen is not None
        return chosen
