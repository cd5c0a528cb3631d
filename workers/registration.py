"""A worker's record in the membership: its state while it starts, its lease while it lives."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os

import redis.asyncio

from cluster.membership import (
    REDIS_ERRORS,
    Membership,
    WorkerRecord,
    WorkerState,
    keep_lease,
    open_redis,
)
from cluster.scheduler.view import Pool
from cluster.tasks import ended
from workers.settings import WorkerSettings

logger = logging.getLogger(__name__)


class Registration:
    def __init__(self, settings: WorkerSettings) -> None:
        self._redis: redis.asyncio.Redis = open_redis(settings.redis_url)
        self._membership = Membership(self._redis, settings.cluster, settings.lease_s)
        self._changed = asyncio.Event()
        self._superseded = False
        self.draining = asyncio.Event()
        """Set when somebody asked this start of the worker to drain."""
        self.record = WorkerRecord(
            worker_id=settings.worker_id,
            incarnation=settings.incarnation,
            started_unix_s=settings.started_unix_s,
            pool=Pool(settings.pool),
            state=WorkerState.STARTING,
            accelerator=settings.accelerator,
            node=settings.node,
            pid=os.getpid(),
            placement_reason=settings.placement_reason,
        )
        self._task = asyncio.create_task(
            keep_lease(self._write, settings.lease_s, self._changed), name="lease"
        )

    def update(self, state: WorkerState, address: str = "", detail: str = "") -> None:
        self.record = dataclasses.replace(
            self.record, state=state, address=address or self.record.address, detail=detail
        )
        self._changed.set()

    def drain(self, until_unix_s: float) -> None:
        """Routers see it at the next write, which is at once if Redis is there. One that drains
        already may only be told to do it sooner."""
        drains = self.record.state is WorkerState.DRAINING
        sooner = drains and until_unix_s < self.record.drain_until_unix_s
        if self.record.state is WorkerState.READY or sooner:
            self.record = dataclasses.replace(
                self.record, state=WorkerState.DRAINING, drain_until_unix_s=until_unix_s
            )
            self.draining.set()
            self._changed.set()

    async def close(self) -> None:
        """Leave: routers see it at once, not when the lease runs out."""
        await ended(self._task)
        with contextlib.suppress(*REDIS_ERRORS):
            await self._membership.remove_worker(self.record.worker_id, self.record.incarnation)
        await self._redis.aclose()

    async def _write(self) -> None:
        written = await self._membership.put_worker(self.record)
        if not written and not self._superseded:
            logger.error("another start of %s has its place", self.record.worker_id)
        self._superseded = not written
        if not written or self.record.state is not WorkerState.READY:
            return
        asked = await self._membership.drain_asked(self.record.worker_id)
        if asked is not None and asked.incarnation == self.record.incarnation:
            self.drain(asked.until_unix_s)
            await self._membership.put_worker(self.record)
