"""The controller keeps worker actors to match the desired pools."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib
import json
import logging
import time
import uuid
from collections import Counter
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.controller_settings import ControllerSettings
from cluster.engine_build import on_gpu
from cluster.errors import one_line
from cluster.logs import configure_logs
from cluster.membership import (
    BETWEEN_STARTS_S,
    DRAINED,
    REDIS_ERRORS,
    DesiredPools,
    DrainRequest,
    Membership,
    WorkerRecord,
    WorkerState,
    open_redis,
)
from cluster.model_shape import KnownShape, memory_share, model_shape
from cluster.node_placement import fitting, place
from cluster.placement_request import (
    NotEnoughCapacity,
    PlacementRequest,
    WorkerNeeds,
    WorkerPlacement,
)
from cluster.ray_calls import NAMESPACE, WORKER_ACTOR, awaited
from cluster.ray_nodes import live_nodes
from cluster.scheduler.view import Pool
from cluster.tasks import ended

logger = logging.getLogger(__name__)

RECONCILE_EVERY_S = 0.5
PLACE_DEADLINE_S = 60.0
ANSWER_DEADLINE_S = 3.0
STOP_DEADLINE_S = 15.0
ROLL_DEADLINE_S = 30.0
"""For the requests of a worker that makes way for one with newer settings."""
BACKOFF_FIRST_S, BACKOFF_MAX_S = 1.0, 60.0
ROOM_EVERY_S = 1.0
"""How often room is looked for where there was none."""
HEALTHY_AFTER_S = 60.0
"""A worker that served this long, and was not stuck meanwhile, starts over with the first
back-off."""


@dataclass(slots=True)
class _Slot:
    """A worker that is wanted: its actor, or when to try again."""

    worker_id: str
    pool: Pool
    incarnation: str = ""
    started_unix_s: float = 0.0
    settings: ControllerSettings | None = None
    """It was started with these."""
    drain_asked: bool = False
    actor: Any = None
    group: PlacementGroup | None = None
    node: str = ""
    task: asyncio.Task[None] | None = None
    starts: int = 0
    ready_at_s: float = 0.0
    """0 until it was seen ready."""
    seen_at_s: float = 0.0
    """When it last had its lease."""
    lapsed: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    retry_at_s: float = 0.0
    failure: str = ""
    unplaced: str = ""
    """Why it waits for room while others run."""
    placement: WorkerPlacement | None = None


class Controller:
    """Run it as an actor, see `cluster/controller_actor.py`, until `stop` is called."""

    def __init__(self, settings_json: str) -> None:
        configure_logs()
        self._settings = ControllerSettings.from_json(settings_json)
        self._redis = open_redis(self._settings.redis_url)
        self._membership = Membership(self._redis, self._settings.cluster, self._settings.lease_s)
        self._slots: dict[str, _Slot] = {}
        self._ready: set[str] = set()
        """Incarnations that serve."""
        self._desired = DesiredPools(0, 0)
        self._stopping = False
        self._started_unix_s = 0.0
        """When workers were started last."""
        self._shape: tuple[ControllerSettings, KnownShape] | None = None
        self._on_gpu = on_gpu()
        self._loop: asyncio.Task[None] | None = None
        self._problem = ""

    async def start(self, settings_json: str, prefill: int, decode: int) -> None:
        """Want these pools, and start keeping them. Workers with older settings than these make way
        one by one."""
        self._settings = ControllerSettings.from_json(settings_json)
        await self._membership.set_desired(DesiredPools(prefill, decode))
        if self._loop is None:
            self._loop = asyncio.create_task(self._run(), name="reconcile")

    async def problem(self) -> str:
        """Why workers cannot be placed or started now; empty when nothing is wrong."""
        return self._problem

    async def stop(self) -> None:
        """Stop all workers and wait for them."""
        self._stopping = True
        if self._loop is not None:
            await ended(self._loop)
        await asyncio.gather(*(self._retire(slot) for slot in list(self._slots.values())))
        with contextlib.suppress(*REDIS_ERRORS):
            await self._redis.aclose()

    # --- reconciling ----------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(*REDIS_ERRORS):
                desired = await self._membership.desired()
                if desired is not None:
                    self._desired = desired
            try:
                await self._look()
                await self._reconcile()
            except Exception as error:
                logger.exception("reconciling failed")
                self._problem = one_line(error)
            await asyncio.sleep(RECONCILE_EVERY_S)

    async def _look(self) -> None:
        """Notice who serves, and who has stopped to without ending: a frozen process, or one that
        is cut off."""
        now = time.monotonic()
        try:
            records = {record.incarnation: record for record in await self._membership.workers()}
        except REDIS_ERRORS:
            # Leases say nothing.
            self._ready.clear()
            for slot in self._slots.values():
                slot.seen_at_s = now
            return
        self._ready = {i for i, record in records.items() if record.state is WorkerState.READY}
        for slot in self._slots.values():
            if slot.task is None:
                # A record holds for one lease only.
                if slot.unplaced:
                    await self._record(slot, WorkerState.PLACING, slot.unplaced)
                elif slot.failure not in ("", DRAINED):
                    # It waits out its back-off.
                    await self._record(slot, WorkerState.FAILED, slot.failure)
            elif slot.incarnation in records:
                slot.seen_at_s = now
                if slot.incarnation in self._ready:
                    slot.ready_at_s = slot.ready_at_s or now
            elif slot.ready_at_s and now - slot.seen_at_s > self._settings.stuck_after_s:
                slot.lapsed.set()

    async def _reconcile(self) -> None:
        wanted = {f"prefill-{i}": Pool.PREFILL for i in range(self._desired.prefill)}
        wanted |= {f"decode-{i}": Pool.DECODE for i in range(self._desired.decode)}
        for worker_id in [worker_id for worker_id in self._slots if worker_id not in wanted]:
            await self._retire(self._slots.pop(worker_id))
        for worker_id, pool in wanted.items():
            self._slots.setdefault(worker_id, _Slot(worker_id, pool))
        due = self._due()
        if due:
            await self._start(due)
        await self._roll()

    def _due(self) -> list[_Slot]:
        """Those to be started now. Who waits for room leaves it to the other pool's only worker,
        while that one waits out its back-off."""
        now = time.monotonic()
        slots = self._slots.values()
        due = [slot for slot in slots if slot.task is None and now >= slot.retry_at_s]
        alive = {slot.pool for slot in slots if slot.task is not None}
        back_soon = {
            slot.pool
            for slot in slots
            if slot not in due and slot.task is None and not slot.unplaced
        }
        return [slot for slot in due if not (slot.unplaced and back_soon - alive - {slot.pool})]

    async def _roll(self) -> None:
        """Have a worker with older settings drained, if all others serve."""
        slots = self._slots.values()
        stale = [slot for slot in slots if slot.settings != self._settings]
        if not stale or not all(s.incarnation in self._ready and not s.drain_asked for s in slots):
            return
        slot = stale[0]
        logger.info("%s drains to start anew with newer settings", slot.worker_id)
        request = DrainRequest(slot.incarnation, time.time() + ROLL_DEADLINE_S)
        with contextlib.suppress(*REDIS_ERRORS):
            await self._membership.ask_drain(slot.worker_id, request, 2 * ROLL_DEADLINE_S)
            slot.drain_asked = True

    async def _start(self, slots: list[_Slot]) -> None:
        """Choose nodes for these workers together, and start them there. Where some run, as many as
        there is room for: the others wait."""
        pools = Counter(slot.pool for slot in slots)
        known = await self._model_shape()
        request = PlacementRequest(
            prefill_workers=pools[Pool.PREFILL],
            decode_workers=pools[Pool.DECODE],
            model=known.shape,
            model_note=known.note,
            prefill=self._needs(Pool.PREFILL),
            decode=self._needs(Pool.DECODE),
            prefill_accelerator=self._settings.prefill_accelerator,
            decode_accelerator=self._settings.decode_accelerator,
        )
        nodes, addresses = live_nodes()
        some_ran = any(slot.incarnation for slot in self._slots.values())
        shortage = ""
        try:
            placements = place(nodes, request)
        except NotEnoughCapacity as error:
            shortage = str(error)
            alive = Counter(slot.pool for slot in self._slots.values() if slot.task is not None)
            fits = fitting(nodes, request, (alive[Pool.PREFILL], alive[Pool.DECODE]))
            placements = place(nodes, fits) if some_ran else []
        self._problem = shortage
        started_unix_s = await self._start_time() if placements else 0.0
        for placement in placements:
            slot = next(s for s in slots if s.pool == placement.role and s.task is None)
            slot.placement = placement
            slot.node = addresses[placement.node_id]
            slot.starts += 1
            slot.incarnation = uuid.uuid4().hex[:12]
            slot.started_unix_s = started_unix_s
            slot.settings, slot.drain_asked, slot.ready_at_s = self._settings, False, 0.0
            slot.unplaced = ""
            slot.lapsed.clear()
            slot.task = asyncio.create_task(self._live(slot), name=slot.worker_id)
        for slot in (slot for slot in slots if slot.task is None):
            slot.retry_at_s = time.monotonic() + ROOM_EVERY_S
            if some_ran and not slot.unplaced:
                logger.warning("%s waits for room: %s", slot.worker_id, shortage)
            slot.unplaced = shortage if some_ran else ""

    async def _start_time(self) -> float:
        """Later than all before, for routers keep to the latest start of a worker. Redis knows of
        other controllers' starts."""
        started_unix_s = max(time.time(), self._started_unix_s + BETWEEN_STARTS_S)
        with contextlib.suppress(*REDIS_ERRORS):
            started_unix_s = await self._membership.start_time(started_unix_s)
        self._started_unix_s = started_unix_s
        return started_unix_s

    async def _model_shape(self) -> KnownShape:
        """The same for both pools, or no hand-off would be taken."""
        if self._shape is None or self._shape[0] != self._settings:
            settings = self._settings
            # A thread, for it may ask the hub.
            known = await asyncio.to_thread(
                model_shape, settings.model_path, settings.vllm_args[Pool.DECODE]
            )
            if known.shape is None:
                return known
            self._shape = settings, known
        return self._shape[1]

    def _needs(self, pool: Pool) -> WorkerNeeds:
        """On CPU each rank computes on cores of its own."""
        ranks = self._settings.tensor_parallel[pool]
        return WorkerNeeds(
            tensor_parallel=ranks,
            accelerators=float(ranks) if self._on_gpu else 0.0,
            cpus=1.0 if self._on_gpu else float(ranks),
            memory_share=memory_share(self._settings.vllm_args[pool]),
        )

    async def _live(self, slot: _Slot) -> None:
        """One start of one worker, from its placement group to its end."""
        try:
            slot.failure = await self._run_actor(slot)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            slot.failure = one_line(_cause(error))
        finally:
            self._release(slot)
        if slot.failure == DRAINED:
            logger.info("%s is drained and starts anew", slot.worker_id)
            slot.starts, slot.task = 0, None
            return
        served_s = time.monotonic() - slot.ready_at_s if slot.ready_at_s else 0.0
        if served_s > HEALTHY_AFTER_S + self._settings.stuck_after_s:
            slot.starts = 1
        backoff_s = backoff_after(slot.starts)
        logger.error("%s ended, next try in %g s: %s", slot.worker_id, backoff_s, slot.failure)
        slot.retry_at_s = time.monotonic() + backoff_s
        self._problem = f"{slot.worker_id} ended: {slot.failure}"
        await self._record(slot, WorkerState.FAILED, slot.failure)
        slot.task = None

    async def _run_actor(self, slot: _Slot) -> str:
        assert slot.placement is not None
        await self._record(slot, WorkerState.PLACING)
        needs = self._needs(slot.pool)
        bundle = {"CPU": needs.cpus}
        if needs.accelerators:
            bundle["GPU"] = needs.accelerators
        # One bundle keeps a worker's tensor-parallel ranks on one node: the one that was chosen.
        slot.group = placement_group(
            [bundle], strategy="STRICT_PACK", _soft_target_node_id=slot.placement.node_id
        )
        await asyncio.wait_for(awaited(slot.group.ready()), PLACE_DEADLINE_S)
        self._see_node(slot)
        actor_class = ray.remote(_import(WORKER_ACTOR))
        slot.actor = actor_class.options(
            name=f"{self._settings.cluster}/{slot.worker_id}/{slot.incarnation}",
            namespace=NAMESPACE,
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            max_concurrency=8,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                slot.group, placement_group_bundle_index=0
            ),
        ).remote()
        await self._record(slot, WorkerState.STARTING)
        run = asyncio.ensure_future(
            awaited(slot.actor.run.remote(self._worker_settings(slot), *self._share(slot)))
        )
        lapsed = asyncio.create_task(slot.lapsed.wait())
        try:
            await asyncio.wait({run, lapsed}, return_when=asyncio.FIRST_COMPLETED)
            if run.done():
                return str(run.result())
            return f"it gave no sign of life for {self._settings.stuck_after_s:g} s"
        finally:
            run.cancel()
            lapsed.cancel()
            await asyncio.gather(run, lapsed, return_exceptions=True)

    def _see_node(self, slot: _Slot) -> None:
        """Ray takes the node that was chosen as a hint only: somebody else may have been faster."""
        chosen = slot.placement
        assert chosen is not None
        node_id = placement_group_table(slot.group)["bundles_to_node_id"][0]
        if node_id == chosen.node_id:
            return
        nodes, addresses = live_nodes()
        node = next((node for node in nodes if node.id == node_id), None)
        if node is None:
            raise RuntimeError(f"Ray placed it on node {node_id[:8]}, which is gone")
        pins = self._settings.prefill_accelerator, self._settings.decode_accelerator
        pin = pins[slot.pool is Pool.DECODE]
        if pin is not None and node.accelerator != chosen.accelerator:
            there = node.accelerator or "no accelerator"
            raise RuntimeError(
                f"Ray placed it on node {node_id[:8]} with {there}, and it is pinned to {pin}"
            )
        reason = (
            f"node {chosen.node_id[:8]} was chosen ({chosen.reason}), but had no more room when "
            "Ray placed it"
        )
        logger.warning("%s is on node %s: %s", slot.worker_id, node_id[:8], reason)
        slot.placement = WorkerPlacement(chosen.role, node_id, node.accelerator, reason)
        slot.node = addresses[node_id]

    def _worker_settings(self, slot: _Slot) -> str:
        assert slot.placement is not None
        settings = self._settings
        return json.dumps(
            {
                "worker_id": slot.worker_id,
                "incarnation": slot.incarnation,
                "started_unix_s": slot.started_unix_s,
                "vllm_args": settings.vllm_args[slot.pool],
                "host": settings.worker_host or slot.node,
                "accelerator": slot.placement.accelerator or "CPU",
                "handoff": settings.handoff,
                "redis_url": settings.redis_url,
                "cluster": settings.cluster,
                "lease_s": settings.lease_s,
                "stuck_after_s": settings.stuck_after_s,
                "preemption_notice_s": settings.preemption_notice_s,
                "pool": slot.pool.value,
                "node": slot.placement.node_id[:8],
                "placement_reason": slot.placement.reason,
            }
        )

    def _share(self, slot: _Slot) -> tuple[int, int, int]:
        """This worker's first share and its number of shares, one for each rank, of all into which
        its machine's cores are divided (of 0: no dividing)."""
        if self._on_gpu:
            return 0, 0, 0
        ranks = self._settings.tensor_parallel
        there = [s for s in self._slots.values() if s.node == slot.node]
        before = sum(ranks[s.pool] for s in there if s.worker_id < slot.worker_id)
        return before, ranks[slot.pool], sum(ranks[s.pool] for s in there)

    async def _retire(self, slot: _Slot) -> None:
        if slot.actor is not None and slot.task is not None:
            # A worker that does not even answer is still importing or loading, or hangs: it has
            # nothing to finish, and is killed below.
            with contextlib.suppress(Exception):
                await asyncio.wait_for(awaited(slot.actor.stop.remote()), ANSWER_DEADLINE_S)
                await asyncio.wait_for(asyncio.shield(slot.task), STOP_DEADLINE_S)
        if slot.task is not None:
            await ended(slot.task)
        self._release(slot)
        with contextlib.suppress(*REDIS_ERRORS):
            await self._membership.remove_worker(slot.worker_id, slot.incarnation)

    def _release(self, slot: _Slot) -> None:
        if slot.actor is not None:
            with contextlib.suppress(Exception):
                ray.kill(slot.actor)
            slot.actor = None
        if slot.group is not None:
            with contextlib.suppress(Exception):
                remove_placement_group(slot.group)
            slot.group = None

    async def _record(self, slot: _Slot, state: WorkerState, detail: str = "") -> None:
        """The states that the worker itself cannot write: it does not run yet, or no longer."""
        placement = None if slot.unplaced else slot.placement
        record = WorkerRecord(
            worker_id=slot.worker_id,
            # Whoever waits for the former start's end is not to take this for it.
            incarnation="" if slot.unplaced else slot.incarnation,
            started_unix_s=slot.started_unix_s,
            pool=slot.pool,
            state=state,
            accelerator=(placement.accelerator or "CPU") if placement else "",
            node=placement.node_id[:8] if placement else "",
            placement_reason=placement.reason if placement else "",
            detail=detail,
        )
        with contextlib.suppress(*REDIS_ERRORS):
            await self._membership.put_worker(record)


def backoff_after(starts: int) -> float:
    """Seconds until a worker that so many starts in a row have failed is started again."""
    return min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2.0 ** min(starts - 1, 10))


def _import(path: str) -> Any:
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


def _cause(error: BaseException) -> BaseException:
    """What went wrong in the actor, without Ray's wrapping."""
    return getattr(error, "cause", None) or error
