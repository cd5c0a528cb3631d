"""Keeps the router's links in step with the membership in Redis."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from functools import partial

import grpc.aio

from cluster.errors import one_line
from cluster.membership import (
    REDIS_DEADLINE_S,
    REDIS_ERRORS,
    Membership,
    WorkerRecord,
)
from cluster.scheduler.view import Pool, WorkerKey
from cluster.tasks import ended
from router.background import repeat
from router.cluster_core import TICK_S, ClusterCore
from router.following import Leases, Starts, follow, key_of
from router.metrics import RouterMetrics

logger = logging.getLogger(__name__)

POLL_S = 0.5


class MemberWatcher:
    """Connects to workers that become ready, and drops those that are gone.

    A worker is gone when its link breaks or its lease has run out. With Redis out of reach leases
    say nothing, and only broken links count.
    """

    def __init__(self, membership: Membership, core: ClusterCore, metrics: RouterMetrics) -> None:
        self._membership = membership
        self._core = core
        self._metrics = metrics
        self.records: list[WorkerRecord] = []
        self.desired: dict[str, int] = {}
        self.redis_reachable = True
        self.links_changed = asyncio.Event()
        """Set when there is one more or less."""
        self._leases = Leases(grace_s=membership.lease_s + REDIS_DEADLINE_S)
        self._starts = Starts()
        self._records_by_key: dict[WorkerKey, WorkerRecord] = {}
        self._connecting: dict[WorkerKey, asyncio.Task[None]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._unreachable: set[WorkerKey] = set()

    async def run(self) -> None:
        try:
            await repeat(self._turn, min(POLL_S, TICK_S))
        finally:
            await ended(*self._connecting.values(), *self._closing)

    async def _turn(self) -> None:
        try:
            await self._read()
            if self.redis_reachable:
                self._follow(self.records)
        finally:
            self._core.tick()
            self._measure()

    async def _read(self) -> None:
        try:
            self.records = self._starts.latest(await self._membership.workers())
            desired = await self._membership.desired()
            self.desired = dataclasses.asdict(desired) if desired else {}
            self._leases.on_read(await self._membership.run_id(), time.monotonic())
            self.redis_reachable = True
        except REDIS_ERRORS as error:
            self._leases.on_failure()
            if self.redis_reachable:
                logger.warning("Redis is out of reach, keeping the workers known: %s", error)
            self.redis_reachable = False

    def _follow(self, records: list[WorkerRecord]) -> None:
        self._records_by_key = {key_of(record): record for record in records}
        steps = follow(
            records,
            self._core.scheduler.view,
            self._connecting,
            time.time(),
            self._leases.tell(time.monotonic()),
        )
        for key in steps.lost:
            self._drop(key, "its lease ran out")
        for key, left_s in steps.draining.items():
            self._core.relieve(key, left_s)
        for key in steps.evacuate:
            self._core.relieve(key, 0.0)
        for record in steps.connect:
            # In a task of its own, so that one that hangs does not hold up the others.
            key = key_of(record)
            task = asyncio.create_task(self._connect(key, record), name=f"connect {key}")
            self._connecting[key] = task
            task.add_done_callback(partial(self._forget_connecting, key))
        self._unreachable &= self._records_by_key.keys()

    def _forget_connecting(self, key: WorkerKey, task: asyncio.Task[None]) -> None:
        del self._connecting[key]

    async def _connect(self, key: WorkerKey, record: WorkerRecord) -> None:
        try:
            await self._core.connect(
                key,
                record.address,
                # While it was connecting, it may have been told to drain.
                lambda: self._records_by_key.get(key, record),
                # At once, whatever this watcher waits for.
                lambda reason: self._drop(key, f"its link broke: {reason}"),
            )
        except Exception as error:
            reason = error.details() if isinstance(error, grpc.aio.AioRpcError) else one_line(error)
            # Tried again twice a second: said once.
            if key not in self._unreachable:
                logger.warning("worker %s does not answer: %s", key, reason)
            self._unreachable.add(key)
        else:
            self._unreachable.discard(key)
            self.links_changed.set()

    def _drop(self, key: WorkerKey, reason: str) -> None:
        link = self._core.remove(key)
        if link is None:
            return
        logger.warning("worker %s is taken out: %s", key, reason)
        self.links_changed.set()
        self._measure()
        # Closing waits for the other end, which may be frozen.
        task = asyncio.create_task(link.close(), name=f"close {key}")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _measure(self) -> None:
        workers = self._core.scheduler.view.workers.values()
        pools = [worker.pool for worker in workers]
        for pool in Pool:
            self._metrics.workers.labels(pool).set(pools.count(pool))
        self._metrics.others.set(sum(worker.others.decodes for worker in workers))
        self._metrics.queued.set(self._core.scheduler.queued)
