"""What a worker tells its routers of its load, beside what it has generated for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.metrics.stats import PrefixCacheStats, SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder

from cluster.wire import worker_pb2
from workers.kv.transfer import Sent
from workers.server import WorkerService

BUSY = worker_pb2.WorkerLoad(running=3, waiting=1, kv_usage=0.95, inbox_bytes=7)
IDLE = worker_pb2.WorkerLoad()


def stats(running: int, queries: int) -> SchedulerStats:
    counted = PrefixCacheStats(requests=1, queries=queries, hits=0)
    return SchedulerStats(num_running_reqs=running, prefix_cache_stats=counted)


class Router:
    """Its end of a stream, in this process."""

    def __init__(self, service: WorkerService) -> None:
        self._stream = service.Engine(self._nothing(), cast(Any, None))
        self._heard: list[worker_pb2.FromEngine] = []

    @staticmethod
    async def _nothing() -> AsyncIterator[worker_pb2.ToEngineBatch]:
        await asyncio.Event().wait()
        yield worker_pb2.ToEngineBatch()

    async def hears_message(self) -> worker_pb2.FromEngine:
        while not self._heard:
            batch = await asyncio.wait_for(anext(self._stream), 5)
            self._heard.extend(batch.messages)
        return self._heard.pop(0)

    async def hears(self) -> tuple[worker_pb2.WorkerLoad, EngineCoreOutputs]:
        step = (await self.hears_message()).outputs
        return step.load, MsgpackDecoder(EngineCoreOutputs).decode(list(step.outputs))

    async def leave(self) -> None:
        await self._stream.aclose()


async def linked(routers: int) -> tuple[WorkerService, list[Router]]:
    service = WorkerService(asyncio.get_running_loop())
    nothing = SimpleNamespace(tell_kv=lambda client: None, abort=lambda ids: None)
    service.engine = cast(Any, nothing)
    there = [Router(service) for _ in range(routers)]
    for router in there:
        assert (await router.hears())[0] == IDLE
    return service, there


def all_heard(service: WorkerService, client: int) -> bool:
    return not service._links[client].outgoing.waiting


async def test_a_load_that_went_with_nobodys_outputs_is_told_to_all() -> None:
    service, routers = await linked(2)
    service.on_load(BUSY, None)
    service.on_load(IDLE, None)
    for router in routers:
        assert [(await router.hears())[0] for _ in range(2)] == [BUSY, IDLE]


async def test_who_has_outputs_is_not_told_again_and_the_others_are() -> None:
    service, (one, other) = await linked(2)
    outputs = EngineCoreOutputs(outputs=[EngineCoreOutput("r", [5])])
    service.on_outputs(1, outputs, BUSY)
    service.on_load(BUSY, None)
    load, heard = await one.hears()
    assert load == BUSY and [output.request_id for output in heard.outputs] == ["r"]
    load, heard = await other.hears()
    assert load == BUSY and not heard.outputs
    assert all_heard(service, 1)


async def test_a_new_router_is_told_what_the_others_know() -> None:
    service, _ = await linked(1)
    service.on_load(BUSY, stats(3, queries=10))
    await asyncio.sleep(0)
    load, heard = await Router(service).hears()
    assert load == BUSY and heard.scheduler_stats is not None
    assert heard.scheduler_stats.num_running_reqs == 3
    assert heard.scheduler_stats.prefix_cache_stats.queries == 0


async def test_gauges_go_to_all_and_what_is_counted_to_one() -> None:
    service, routers = await linked(2)
    outputs = EngineCoreOutputs(
        outputs=[EngineCoreOutput("r", [5])], scheduler_stats=stats(3, queries=10)
    )
    service.on_outputs(1, outputs, BUSY)
    service.on_load(BUSY, None)
    # A step without outputs, and one in which nothing changed.
    service.on_load(IDLE, stats(0, queries=20))
    service.on_load(IDLE, stats(0, queries=40))
    told = [(await router.hears())[1].scheduler_stats for router in [*routers, *routers]]
    told.append((await routers[0].hears())[1].scheduler_stats)
    assert [s.num_running_reqs for s in told if s] == [3, 3, 0, 0, 0]
    assert [s.prefix_cache_stats.queries for s in told if s] == [10, 0, 20, 0, 40]
    assert all_heard(service, 2)


async def test_stats_for_a_router_that_left_go_to_another() -> None:
    service, (gone, other) = await linked(2)
    await gone.leave()
    outputs = EngineCoreOutputs(
        outputs=[EngineCoreOutput("r", [5])], scheduler_stats=stats(3, queries=10)
    )
    service.on_outputs(1, outputs, BUSY)
    load, heard = await other.hears()
    assert load == BUSY and not heard.outputs
    assert heard.scheduler_stats is not None
    assert heard.scheduler_stats.prefix_cache_stats.queries == 10
    await other.leave()


async def test_what_it_cannot_deliver_all_routers_hear_of() -> None:
    service, routers = await linked(2)
    # Transfers end on threads of their own.
    await asyncio.to_thread(service.on_sent, Sent("t1", True, "", 8))
    await asyncio.to_thread(service.on_sent, Sent("t2", False, "nobody answers", 0))
    told = worker_pb2.Undelivered(transfer_id="t2", reason="nobody answers")
    for router in routers:
        assert await router.hears_message() == worker_pb2.FromEngine(undelivered=told)
