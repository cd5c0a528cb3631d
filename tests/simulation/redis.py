"""Redis as the membership uses it: records with a lease, and drains that were asked for."""

from __future__ import annotations

from cluster.membership import DrainRequest, WorkerRecord
from tests.simulation.timeline import Node, Timeline

LEASE_S = 2.4


class SimRedis(Node):
    def __init__(self, timeline: Timeline) -> None:
        super().__init__(timeline, "redis")
        self.drains: dict[str, DrainRequest] = {}
        self.run_id = 1
        self._loads: dict[str, tuple[str, float]] = {}
        self._records: dict[str, tuple[WorkerRecord, float]] = {}

    def put_worker(self, record: WorkerRecord) -> bool:
        held, until_s = self._records.get(record.worker_id, (record, 0.0))
        if self.timeline.now_s < until_s and record.is_superseded_by(held):
            return False
        self._records[record.worker_id] = (record, self.timeline.now_s + LEASE_S)
        return True

    def remove_worker(self, record: WorkerRecord) -> None:
        held, _ = self._records.get(record.worker_id, (None, 0.0))
        if held is not None and held.incarnation == record.incarnation:
            del self._records[record.worker_id]

    def workers(self) -> list[WorkerRecord]:
        now_s = self.timeline.now_s
        return [record for record, until_s in self._records.values() if now_s < until_s]

    def put_load(self, router: str, placed: str) -> None:
        self._loads[router] = (placed, self.timeline.now_s + LEASE_S)

    def loads_of_others(self, router: str) -> list[str]:
        told = [(name, *load) for name, load in self._loads.items() if name != router]
        return [placed for _, placed, until_s in told if self.timeline.now_s < until_s]

    def restart(self, keeps: bool) -> None:
        self.alive = True
        self.run_id += 1
        self.changed_at_s = self.timeline.now_s
        if not keeps:
            self._records.clear()
            self._loads.clear()
            self.drains.clear()
