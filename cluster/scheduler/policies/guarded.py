"""Policies of other packages: one that fails must not take requests with it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cluster.scheduler.policy import Ask, Placement, PlacementPolicy
from cluster.scheduler.view import ClusterView


@dataclass(frozen=True, slots=True)
class Guarded:
    """What `policy` cannot place because of an error in it, `fallback` places. The placement's
    reason says so."""

    policy: PlacementPolicy
    fallback: PlacementPolicy

    def place(self, ask: Ask, view: ClusterView) -> Placement | None:
        try:
            placement = self.policy.place(ask, view)
            if placement is not None:
                _check(ask, placement, view)
            return placement
        except Exception as error:
            placement = self.fallback.place(ask, view)
            reason = f"policy failed: {type(error).__name__}"
            return None if placement is None else replace(placement, reason=reason)


def _check(ask: Ask, placement: Placement, view: ClusterView) -> None:
    """
    Raises:
        KeyError: it names a worker that is not there.
        ValueError: they cannot take the request, or not hand it over to each other.
    """
    prefill, decode = view.workers[placement.prefill], view.workers[placement.decode]
    if prefill.model != decode.model:
        raise ValueError(f"{prefill.key} and {decode.key} have different models")
    for worker in (prefill, decode):
        if worker.draining or ask.tokens_to_compute >= worker.max_model_len_tokens:
            raise ValueError(f"{worker.key} is draining or too short")
        if view.is_full(worker):
            raise ValueError(f"{worker.key} is full")
