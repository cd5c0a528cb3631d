"""A worker's gRPC server: the engine for routers, the inbox for other workers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc
import grpc.aio
import msgspec
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from vllm.v1.engine import EngineCoreOutputs, UtilityOutput
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackEncoder

from cluster.arrivals import Arrivals, MessageLost
from cluster.outgoing import WAITING_MAX, Outgoing
from cluster.wire import worker_pb2, worker_pb2_grpc
from workers.engine import encode_result
from workers.kv.transfer import Sent

logger = logging.getLogger(__name__)

SERVICES = ("baton.v1.Worker", "baton.v1.KvInbox")


class Engine(Protocol):
    """What is done for routers: an EngineHost. May be called on any thread."""

    def holdings(self) -> worker_pb2.Holdings: ...

    def tell_kv(self, client: int) -> None: ...

    def hold(self, message: worker_pb2.HoldPrefix) -> None: ...

    def add(self, client: int, message: worker_pb2.AddRequest) -> None: ...

    def abort(self, request_ids: list[str]) -> None: ...

    def drop_transfer(self, transfer_id: str) -> None: ...

    def sender_lost(self, transfer_id: str, reason: str) -> None: ...

    def move_out(self, client: int, move: worker_pb2.MoveOut) -> None: ...

    def call(self, client: int, call_id: int, method: str, args: list[Any]) -> None: ...


@dataclass(slots=True)
class _Link:
    """One router's stream."""

    client: int
    outgoing: Outgoing[worker_pb2.FromEngine] = field(default_factory=Outgoing)
    arrivals: Arrivals = field(default_factory=Arrivals)
    request_ids: set[str] = field(default_factory=set)
    holds: set[str] = field(default_factory=set)
    """Transfers for which beginnings are held, until their decode leg comes."""
    load: worker_pb2.WorkerLoad | None = None
    """That it was told last."""


class WorkerService(worker_pb2_grpc.WorkerServicer):
    """Bridges the engine's thread and the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._links: dict[int, _Link] = {}
        self._next_client = 0
        self._encoder = MsgpackEncoder()
        self._load = worker_pb2.WorkerLoad()
        self._gauges = SchedulerStats()
        self.failed: asyncio.Future[str] = loop.create_future()
        self.stuck = False
        self.description = worker_pb2.WorkerDescription()
        self.engine: Engine | None = None

    @property
    def requests(self) -> int:
        """Requests that routers have running or waiting here."""
        return sum(len(link.request_ids) for link in self._links.values())

    async def Describe(  # noqa: N802 - gRPC's name
        self,
        request: worker_pb2.DescribeRequest,
        context: grpc.aio.ServicerContext[worker_pb2.DescribeRequest, worker_pb2.WorkerDescription],
    ) -> worker_pb2.WorkerDescription:
        if self.failed.done():
            await context.abort(grpc.StatusCode.UNAVAILABLE, self.failed.result())
        return self.description

    async def Hold(  # noqa: N802 - gRPC's name
        self,
        request: worker_pb2.HoldRequest,
        context: grpc.aio.ServicerContext[worker_pb2.HoldRequest, worker_pb2.Holdings],
    ) -> worker_pb2.Holdings:
        assert self.engine is not None, "served before the engine was ready"
        holdings = self.engine.holdings()
        holdings.requests = self.requests
        holdings.tasks = len(asyncio.all_tasks()) - 1
        return holdings

    async def Engine(  # noqa: N802 - gRPC's name
        self,
        requests: AsyncIterator[worker_pb2.ToEngineBatch],
        context: grpc.aio.ServicerContext[worker_pb2.ToEngineBatch, worker_pb2.FromEngineBatch],
    ) -> AsyncIterator[worker_pb2.FromEngineBatch]:
        assert self.engine is not None, "served before the engine was ready"
        self._next_client += 1
        link = self._links[self._next_client] = _Link(self._next_client)
        self.engine.tell_kv(link.client)
        self._send_load(self._load, None)
        reader = asyncio.create_task(self._read(link, requests))
        try:
            while (batch := await link.outgoing.take()) is not None:
                number, messages = batch
                yield worker_pb2.FromEngineBatch(number=number, messages=messages)
        finally:
            reader.cancel()
            del self._links[link.client]
            if link.request_ids:
                logger.info("a router left; aborting its %d requests", len(link.request_ids))
                self.engine.abort(list(link.request_ids))
            for transfer_id in link.holds:
                self.engine.drop_transfer(transfer_id)
            await asyncio.gather(reader, return_exceptions=True)

    async def _read(self, link: _Link, requests: AsyncIterator[worker_pb2.ToEngineBatch]) -> None:
        try:
            async for batch in requests:
                if link.arrivals.is_new(batch.number):
                    for message in batch.messages:
                        self._on_message(link, message)
        except (grpc.aio.BaseError, MessageLost) as error:
            logger.info("a router's stream broke: %s", error)
        except Exception:
            logger.exception("a router's message cannot be handled: closing its stream")
        finally:
            link.outgoing.close()

    def _on_message(self, link: _Link, message: worker_pb2.ToEngine) -> None:
        assert self.engine is not None
        match message.WhichOneof("kind"):
            case "add":
                link.request_ids.add(message.add.leg_id)
                link.holds.discard(message.add.receive.transfer_id)
                self.engine.add(link.client, message.add)
            case "abort":
                self.engine.abort(list(message.abort.request_ids))
                link.request_ids.difference_update(message.abort.request_ids)
            case "drop":
                link.holds.discard(message.drop.transfer_id)
                self.engine.drop_transfer(message.drop.transfer_id)
            case "sender_lost":
                lost = message.sender_lost
                self.engine.sender_lost(lost.transfer_id, lost.reason)
            case "hold":
                link.holds.add(message.hold.transfer_id)
                self.engine.hold(message.hold)
            case "tell_kv":
                self.engine.tell_kv(link.client)
            case "move":
                self.engine.move_out(link.client, message.move)
            case "taken":
                link.outgoing.on_taken(message.taken.number, message.taken.gather)
            case "utility":
                call = message.utility
                args = msgspec.msgpack.decode(call.args)
                self.engine.call(link.client, call.call_id, call.method, args)

    # --- EngineListener, called on the engine's thread ----------------------------------------

    def on_outputs(
        self,
        client: int,
        outputs: EngineCoreOutputs,
        load: worker_pb2.WorkerLoad,
        kv_events: worker_pb2.KvEvents | None = None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._send_outputs, client, outputs, load, kv_events)

    def on_load(self, load: worker_pb2.WorkerLoad, stats: SchedulerStats | None) -> None:
        self._loop.call_soon_threadsafe(self._send_load, load, stats)

    def on_kv_events(
        self, kv_events: worker_pb2.KvEvents, to: int | None, told: Collection[int] = ()
    ) -> None:
        self._loop.call_soon_threadsafe(self._send_kv_events, kv_events, to, told)

    def on_adopted(self, client: int, adopted: worker_pb2.Adopted) -> None:
        message = worker_pb2.FromEngine(adopted=adopted)
        self._loop.call_soon_threadsafe(self._send, client, message)

    def on_utility(self, client: int, call_id: int, output: UtilityOutput) -> None:
        reply = worker_pb2.UtilityReply(call_id=call_id)
        if output.failure_message is not None:
            reply.error = output.failure_message
        else:
            reply.result = encode_result(output)
        message = worker_pb2.FromEngine(utility=reply)
        self._loop.call_soon_threadsafe(self._send, client, message)

    def on_moved(self, client: int, moved: worker_pb2.MovedOut) -> None:
        self._loop.call_soon_threadsafe(self._send_moved, client, moved)

    def on_sent(self, sent: Sent) -> None:
        """Called on the transfer's thread. Its receiver may not have heard of the transfer, and
        would wait for it."""
        if sent.delivered:
            return
        logger.warning("transfer %s was not delivered: %s", sent.transfer_id, sent.reason)
        message = worker_pb2.FromEngine(
            undelivered=worker_pb2.Undelivered(transfer_id=sent.transfer_id, reason=sent.reason)
        )
        with contextlib.suppress(RuntimeError):  # the loop is closed: so are the streams
            self._loop.call_soon_threadsafe(self._send_to_all, message)

    def on_failed(self, message: str) -> None:
        self._loop.call_soon_threadsafe(self._fail, message)

    def on_stuck(self, reason: str) -> None:
        """Called on the event loop: the engine's thread will say nothing more."""
        logger.error(reason)
        self.stuck = True
        self._fail(reason)

    # --- on the event loop ----------------------------------------------------------------------

    def _send_outputs(
        self,
        client: int,
        outputs: EngineCoreOutputs,
        load: worker_pb2.WorkerLoad,
        kv_events: worker_pb2.KvEvents | None,
    ) -> None:
        if outputs.scheduler_stats is not None:
            self._gauges = gauges_of(outputs.scheduler_stats)
        link = self._links.get(client)
        if link is None:
            # Others still count what is in them.
            if outputs.scheduler_stats is not None:
                self._send_load(load, outputs.scheduler_stats)
            return
        for output in outputs.outputs:
            if output.finish_reason is not None:
                link.request_ids.discard(output.request_id)
        self._send_step(link, outputs, load, kv_events)

    def _send_load(self, load: worker_pb2.WorkerLoad, stats: SchedulerStats | None) -> None:
        """To all who do not know it; a step's stats to one of them, or else to anyone."""
        self._load = load
        if stats is not None:
            self._gauges = gauges_of(stats)
        unaware = [link for link in self._links.values() if link.load != load]
        if stats is not None and not unaware:
            unaware = list(self._links.values())[:1]
        for link in unaware:
            self._send_step(link, EngineCoreOutputs(scheduler_stats=stats), load)
            stats = None

    def _send_step(
        self,
        link: _Link,
        outputs: EngineCoreOutputs,
        load: worker_pb2.WorkerLoad,
        kv_events: worker_pb2.KvEvents | None = None,
    ) -> None:
        link.load = load
        if outputs.scheduler_stats is None:
            outputs.scheduler_stats = self._gauges
        buffers = [bytes(buffer) for buffer in self._encoder.encode(outputs)]
        step = worker_pb2.StepOutputs(outputs=buffers, load=load, kv_events=kv_events)
        self._send(link.client, worker_pb2.FromEngine(outputs=step))

    def _send_kv_events(
        self, kv_events: worker_pb2.KvEvents, to: int | None, told: Collection[int]
    ) -> None:
        for client in list(self._links) if to is None else [to]:
            if client not in told:
                self._send(client, worker_pb2.FromEngine(kv_events=kv_events))

    def _send_moved(self, client: int, moved: worker_pb2.MovedOut) -> None:
        link = self._links.get(client)
        if link is not None and moved.moved:
            link.request_ids.discard(moved.leg_id)
        self._send(client, worker_pb2.FromEngine(moved=moved))

    def _send(self, client: int, message: worker_pb2.FromEngine) -> None:
        link = self._links.get(client)
        if link is None:
            return
        try:
            link.outgoing.put(message)
        except asyncio.QueueFull:
            logger.error("a router is %d messages behind: closing its stream", WAITING_MAX)
            link.outgoing.close()

    def _send_to_all(self, message: worker_pb2.FromEngine) -> None:
        for client in list(self._links):
            self._send(client, message)

    def _fail(self, message: str) -> None:
        failed = worker_pb2.EngineFailed(message=message)
        self._send_to_all(worker_pb2.FromEngine(failed=failed))
        if not self.failed.done():
            self.failed.set_result(message)


def gauges_of(stats: SchedulerStats) -> SchedulerStats:
    """What may be told to several routers: the rest is counted, and goes to one."""
    return SchedulerStats(
        num_running_reqs=stats.num_running_reqs,
        num_waiting_reqs=stats.num_waiting_reqs,
        num_skipped_waiting_reqs=stats.num_skipped_waiting_reqs,
        kv_cache_usage=stats.kv_cache_usage,
    )


async def add_standard_services(server: grpc.aio.Server) -> Any:
    servicer: Any = health.aio.HealthServicer()  # type: ignore[attr-defined]  # stubs lack it
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    for service in ("", *SERVICES):
        await servicer.set(service, health_pb2.HealthCheckResponse.SERVING)
    reflection.enable_server_reflection(
        (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server
    )
    return servicer
