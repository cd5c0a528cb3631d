"""Collects what the operator's page shows from the router's live state."""

from __future__ import annotations

import importlib.metadata
import time

from router.cluster_core import ClusterCore
from router.dashboard.state import DashboardState, WorkerRow
from router.following import key_of
from router.members import MemberWatcher
from router.settings import RouterSettings


class DashboardSource:
    def __init__(self, settings: RouterSettings, core: ClusterCore, watcher: MemberWatcher) -> None:
        self._settings = settings
        self._core = core
        self._watcher = watcher
        self._started_s = time.monotonic()
        self._version = importlib.metadata.version("baton")

    def state(self) -> DashboardState:
        core, tally = self._core, self._core.tally
        return DashboardState(
            cluster=self._settings.cluster,
            model=str(core.vllm_config.model_config.served_model_name),
            router_id=self._settings.router_id,
            version=self._version,
            uptime_s=time.monotonic() - self._started_s,
            workers=self._rows(),
            desired=self._watcher.desired,
            requests_by_path={path.value: count for path, count in tally.by_path.items()},
            requests_running=len(core.scheduler.lives) - core.scheduler.queued,
            requests_queued=core.scheduler.queued,
            handoffs_started=tally.handoffs_started,
            handoffs_completed=tally.handoffs_completed,
            handoffs_failed=tally.handoffs_failed,
            handoff_bytes=tally.handoff_bytes,
            recent_handoffs=list(tally.recent),
            recent_first_tokens=list(tally.first_tokens),
            redis_reachable=self._watcher.redis_reachable,
        )

    def _rows(self) -> list[WorkerRow]:
        rows = []
        unjoined = self._core.unjoined()
        workers = {key.worker_id: worker for key, worker in self._core.workers.items()}
        for record in self._watcher.records:
            worker = workers.get(record.worker_id)
            rows.append(
                WorkerRow(
                    worker_id=record.worker_id,
                    incarnation=record.incarnation,
                    pool=record.pool.value,
                    state=record.state.value,
                    address=record.address,
                    node=record.node,
                    accelerator=record.accelerator,
                    placement_reason=record.placement_reason,
                    running=worker.load.running if worker else 0,
                    waiting=worker.load.waiting if worker else 0,
                    kv_usage=worker.load.kv_usage if worker else 0.0,
                    inbox_bytes=worker.load.inbox_bytes if worker else 0,
                    handoffs_in=worker.handoffs_in if worker else 0,
                    handoffs_out=worker.handoffs_out if worker else 0,
                    handoff_bytes_in=worker.handoff_bytes_in if worker else 0,
                    detail=record.detail or unjoined.get(key_of(record), ""),
                )
            )
        return rows
