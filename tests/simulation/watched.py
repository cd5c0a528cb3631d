"""A policy whose every placement is checked against the workers it saw."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cluster.scheduler.policy import Ask, Placement, PlacementPolicy
from cluster.scheduler.view import ClusterView, Pool, WorkerKey, WorkerView
from tests.simulation.books import Violation


@dataclass(slots=True, eq=False)
class Watched:
    policy: PlacementPolicy
    draws: int = 0

    def place(self, ask: Ask, view: ClusterView) -> Placement | None:
        """
        Raises:
            Violation
        """
        before = {key: replace(worker) for key, worker in view.workers.items()}
        placement = self.policy.place(ask, view)
        if view.workers != before:
            raise Violation(f"placing {ask.request_id} changed what the policy saw")
        if placement is not None:
            self._check_lent(ask, placement, view)
        return placement

    def _check_lent(self, ask: Ask, placement: Placement, view: ClusterView) -> None:
        drawn: list[WorkerKey] = []
        for key, lends, lender in (
            (placement.prefill, placement.lends_prefill, Pool.DECODE),
            (placement.decode, placement.lends_decode, Pool.PREFILL),
        ):
            worker = view.workers[key]
            if lends and worker.pool is not lender:
                raise Violation(f"{ask.request_id}: {key} is lent to its own pool")
            if lends and not worker.mixed:
                drawn.append(key)
        for key in drawn:
            self.draws += 1
            worker = view.workers[key]
            if not any(_stays(peer, worker, drawn) for peer in view.workers.values()):
                raise Violation(f"{ask.request_id} draws {key}, the last of its pool")


def _stays(peer: WorkerView, drawn: WorkerView, all_drawn: list[WorkerKey]) -> bool:
    return (
        peer.pool is drawn.pool
        and peer.model == drawn.model
        and peer.key not in all_drawn
        and not peer.mixed
        and not peer.draining
    )
