"""Workers that have no part in hand-offs, since those of the other pool are of another kind."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.fingerprints import why_not_joined
from cluster.scheduler.view import ClusterView, Pool, WorkerKey
from cluster.wire import worker_pb2


def why_unjoined(
    fingerprints: Mapping[WorkerKey, worker_pb2.Fingerprint], view: ClusterView
) -> dict[WorkerKey, str]:
    """Of each that can be joined to nobody of the other pool: what differs, beside one of those.
    Where the other pool is empty there is nothing to tell."""
    if view.one_model:
        return {}
    unjoined: dict[WorkerKey, str] = {}
    for worker in view.workers.values():
        others = [other for other in view.workers.values() if other.pool is not worker.pool]
        if not others or any(other.model == worker.model for other in others):
            continue
        pair = [worker.key, min(other.key for other in others)]
        sender, receiver = pair if worker.pool is Pool.PREFILL else reversed(pair)
        unjoined[worker.key] = why_not_joined(
            *(sender.worker_id, fingerprints[sender]),
            *(receiver.worker_id, fingerprints[receiver]),
        )
    return unjoined
