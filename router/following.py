"""What a router does about the membership it has read. Pure: the simulation drives it, too."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from cluster.membership import WorkerRecord, WorkerState
from cluster.scheduler.view import ClusterView, WorkerKey


@dataclass(frozen=True, slots=True)
class Steps:
    lost: list[WorkerKey]
    connect: list[WorkerRecord]
    evacuate: list[WorkerKey]
    """Draining, and their time is over."""
    draining: dict[WorkerKey, float] = field(default_factory=dict)
    """The others that drain, with the time they have left."""


@dataclass(slots=True)
class Leases:
    """Whether a missing record tells that its worker is gone. Not so for `grace_s` after Redis
    began anew or was out of reach, as far as this router can know: records may have been lost or
    have run out meanwhile, and workers need that long to write them again."""

    grace_s: float
    trusted_from_s: float = 0.0
    _run_id: str = ""
    """Of the Redis that was read last."""

    def on_read(self, run_id: str, now_s: float) -> None:
        if run_id != self._run_id:
            self.trusted_from_s = now_s + self.grace_s
        self._run_id = run_id

    def on_failure(self) -> None:
        self._run_id = "out of reach"

    def tell(self, now_s: float) -> bool:
        return now_s >= self.trusted_from_s


@dataclass(slots=True)
class Starts:
    """Of two starts of a worker the later one counts, also where Redis has forgotten it."""

    _latest: dict[str, WorkerRecord] = field(default_factory=dict)

    def latest(self, records: Sequence[WorkerRecord]) -> list[WorkerRecord]:
        """Without those of former starts."""
        for record in records:
            known = self._latest.get(record.worker_id)
            if known is None or not record.is_superseded_by(known):
                self._latest[record.worker_id] = record
        return [record for record in records if self._latest[record.worker_id] is record]


def key_of(record: WorkerRecord) -> WorkerKey:
    return WorkerKey(record.worker_id, record.incarnation)


def follow(
    records: Sequence[WorkerRecord],
    view: ClusterView,
    connecting: Collection[WorkerKey],
    now_unix_s: float,
    leases_tell: bool = True,
) -> Steps:
    """Bring pools and drains of the workers in `view` up to date, and tell what else is to do.

    A record of another start of a worker tells that the former one is gone, even if
    `leases_tell` is false.
    """
    ready = {
        key_of(record): record
        for record in records
        if record.state in (WorkerState.READY, WorkerState.DRAINING)
    }
    restarted = {record.worker_id for record in records}
    lost = [
        key
        for key in view.workers
        if key not in ready and (leases_tell or key.worker_id in restarted)
    ]
    connect: list[WorkerRecord] = []
    evacuate: list[WorkerKey] = []
    draining: dict[WorkerKey, float] = {}
    for key, record in ready.items():
        worker = view.workers.get(key)
        if worker is not None:
            worker.draining = record.state is WorkerState.DRAINING
            worker.pool = record.pool
            left_s = record.drain_until_unix_s - now_unix_s
            if worker.draining and left_s < 0:
                evacuate.append(key)
            elif worker.draining:
                draining[key] = left_s
        elif key not in connecting:
            # Also one whose link broke: as long as it keeps its lease, it may answer again.
            connect.append(record)
    return Steps(lost, connect, evacuate, draining)
