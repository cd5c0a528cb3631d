"""The workers there are: calls of vLLM's front end that are for its engine, and so for every
worker, and what workers say of themselves."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import logging
from dataclasses import dataclass, field
from typing import Any

import msgspec
from vllm.exceptions import VLLMServerError
from vllm.lora.request import LoRARequest
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.stats import SchedulerStats

from cluster.scheduler.scheduler import Scheduler
from cluster.scheduler.view import WorkerKey
from cluster.wire import worker_pb2
from router.joining import why_unjoined
from router.link import WorkerLink
from router.other_clock import OtherClock

logger = logging.getLogger(__name__)

UTILITY_DEADLINE_S = 60.0


class WorkerLost(VLLMServerError):  # type: ignore[misc]
    """vLLM's front end answers it with an error object."""


@dataclass(slots=True)
class ConnectedWorker:
    key: WorkerKey
    link: WorkerLink
    description: worker_pb2.WorkerDescription
    stats: SchedulerStats = field(default_factory=SchedulerStats)
    load: worker_pb2.WorkerLoad = field(default_factory=worker_pb2.WorkerLoad)
    calls: dict[int, asyncio.Future[Any]] = field(default_factory=dict)
    handoffs_in: int = 0
    handoffs_out: int = 0
    handoff_bytes_in: int = 0
    kv_sequence: int | None = None
    """Of the last KV events; none while it is to tell all that it holds."""
    clock: OtherClock = field(default_factory=OtherClock)
    """Its own."""

    def lost(self) -> None:
        """It answers no call any more."""
        for call in self.calls.values():
            if not call.done():
                call.set_exception(WorkerLost(f"worker {self.key} was lost before it answered"))


class EveryWorker(EngineCoreClient):  # type: ignore[misc]
    """The workers there are, and calls to all of them or to those that hold an adapter."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.workers: dict[WorkerKey, ConnectedWorker] = {}
        self._worker_up = asyncio.Event()
        self._calls = 0
        self._loras: dict[int, LoRARequest] = {}
        """As workers know them, by the front end's numbers."""

    async def wait_for_worker(self) -> None:
        await self._worker_up.wait()

    async def _call_all(self, method: str, *args: Any) -> list[Any]:
        """Raises RuntimeError with the first worker's error, or WorkerLost."""
        if not self.workers:
            raise EngineDeadError()
        return await self._call_each(list(self.workers.values()), method, *args)

    async def _call_each(
        self, workers: list[ConnectedWorker], method: str, *args: Any
    ) -> list[Any]:
        calls = [self._call(worker, method, list(args)) for worker in workers]
        return list(await asyncio.wait_for(asyncio.gather(*calls), UTILITY_DEADLINE_S))

    def _call(self, worker: ConnectedWorker, method: str, args: list[Any]) -> asyncio.Future[Any]:
        self._calls += 1
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        worker.calls[self._calls] = future
        call = worker_pb2.UtilityCall(
            call_id=self._calls, method=method, args=msgspec.msgpack.encode(args)
        )
        worker.link.send(worker_pb2.ToEngine(utility=call))
        return future

    def on_reply(self, worker: ConnectedWorker, reply: worker_pb2.UtilityReply) -> None:
        future = worker.calls.pop(reply.call_id, None)
        if future is None or future.done():
            return
        if reply.error:
            future.set_exception(RuntimeError(f"{worker.key}: {reply.error}"))
        else:
            future.set_result(msgspec.msgpack.decode(reply.result))

    def on_kv_events(self, worker: ConnectedWorker, events: worker_pb2.KvEvents) -> None:
        prefixes = self.scheduler.prefixes
        if events.reset:
            prefixes.reset(worker.key)
        elif worker.kv_sequence is None:
            return
        elif events.sequence != worker.kv_sequence + 1:
            logger.warning("%s: KV events are missing; asking for all it holds", worker.key)
            worker.kv_sequence = None
            worker.link.send(worker_pb2.ToEngine(tell_kv=worker_pb2.TellKv()))
            return
        worker.kv_sequence = events.sequence
        prefixes.removed(worker.key, events.removed)
        prefixes.stored(worker.key, events.stored)

    def cluster_stats(self, latest: SchedulerStats) -> SchedulerStats:
        """The front end shows one engine: gauges are summed over workers, counters are the
        reporting worker's, which says everything once."""
        stats = [worker.stats for worker in self.workers.values()] or [latest]
        return dataclasses.replace(
            latest,
            num_running_reqs=sum(s.num_running_reqs for s in stats),
            num_waiting_reqs=sum(s.num_waiting_reqs for s in stats),
            num_skipped_waiting_reqs=sum(s.num_skipped_waiting_reqs for s in stats),
            kv_cache_usage=sum(s.kv_cache_usage for s in stats) / len(stats),
        )

    def unjoined(self) -> dict[WorkerKey, str]:
        """Those that have no part in hand-offs, and why."""
        workers = self.workers.items()
        fingerprints = {key: worker.description.fingerprint for key, worker in workers}
        return why_unjoined(fingerprints, self.scheduler.view)

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        await self.wait_for_worker()
        return tuple(next(iter(self.workers.values())).description.supported_tasks)

    async def reset_prefix_cache_async(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        return all(await self._call_all("reset_prefix_cache", reset_running_requests, False))

    async def reset_mm_cache_async(self) -> None:
        if self.workers:
            await self._call_all("reset_mm_cache")

    async def reset_encoder_cache_async(self) -> None:
        await self._call_all("reset_encoder_cache")

    async def profile_async(
        self,
        is_start: bool = True,
        profile_prefix: str | None = None,
        delay_iterations: int | None = None,
        max_iterations: int | None = None,
    ) -> None:
        await self._call_all("profile", is_start, profile_prefix)

    async def add_lora_async(self, lora_request: LoRARequest) -> bool:
        """Load an adapter on one worker, to see that it can be; others load it with the first
        request for it that comes to them. One that is to be loaded anew is, wherever it is."""
        if not self.workers:
            raise EngineDeadError()
        lora = with_lasting_id(lora_request)
        views = self.scheduler.view.workers
        name = adapter_key(lora)
        holders = [w for w in self.workers.values() if views[w.key].adapters.holds(name)]
        if not (lora.load_inplace and holders):
            holders = [min(self.workers.values(), key=lambda w: views[w.key].decodes)][:1]
        added = all(await self._call_each(holders, "add_lora", msgspec.to_builtins(lora)))
        if added:
            self._loras[lora_request.lora_int_id] = lora
            for worker in holders:
                self.scheduler.on_adapter_loaded(worker.key, name)
        return added

    def know_lora(self, lora_request: LoRARequest) -> None:
        """Another router has seen that it can be loaded."""
        self._loras[lora_request.lora_int_id] = with_lasting_id(lora_request)

    async def remove_lora_async(self, lora_id: int) -> bool:
        lora = self._loras.pop(lora_id, None)
        if lora is None:
            return False
        removed = await self._call_all("remove_lora", lora.lora_int_id)
        self.scheduler.on_adapter_removed(adapter_key(lora))
        return any(removed)

    async def list_loras_async(self) -> set[int]:
        loaded = set().union(*await self._call_all("list_loras"))
        return {number for number, lora in self._loras.items() if lora.lora_int_id in loaded}

    async def pin_lora_async(self, lora_id: int) -> bool:
        """On the workers that hold it now."""
        lora = self._loras[lora_id]
        views = self.scheduler.view.workers
        name = adapter_key(lora)
        holders = [w for w in self.workers.values() if views[w.key].adapters.holds(name)]
        return all(await self._call_each(holders, "pin_lora", lora.lora_int_id))

    async def sleep_async(self, level: int = 1, mode: str = "abort") -> None:
        await self._call_all("sleep", level, mode)

    async def wake_up_async(self, tags: list[str] | None = None) -> bool:
        return all(await self._call_all("wake_up", tags))

    async def is_sleeping_async(self) -> bool:
        return any(await self._call_all("is_sleeping"))

    async def pause_scheduler_async(self, mode: str = "abort", clear_cache: bool = True) -> None:
        await self._call_all("pause_scheduler", mode, clear_cache)

    async def resume_scheduler_async(self) -> None:
        await self._call_all("resume_scheduler")

    async def is_scheduler_paused_async(self) -> bool:
        return all(await self._call_all("is_scheduler_paused"))

    async def get_weight_version_async(self) -> str:
        return str((await self._call_all("get_weight_version"))[0])

    async def set_weight_version_async(self, weight_version: str) -> None:
        await self._call_all("set_weight_version", weight_version)


def with_lasting_id(lora: LoRARequest) -> LoRARequest:
    """Front ends number adapters as they come: two routers would mean two by one number, and
    workers know them by number only."""
    digest = hashlib.sha256(f"{lora.lora_name}\0{lora.lora_path}".encode()).digest()
    number = int.from_bytes(digest[:4], "big") >> 1
    return msgspec.structs.replace(lora, lora_int_id=number + 1)


def adapter_key(lora: LoRARequest) -> str:
    return str(lora.lora_int_id)
