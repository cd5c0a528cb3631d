"""What a router makes of the batches of one worker's stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import grpc
import grpc.aio
import pytest

from cluster.wire import worker_pb2, worker_pb2_grpc
from router.link import WorkerLink

FAILED = worker_pb2.FromEngine(failed=worker_pb2.EngineFailed(message="out of memory"))
REPLY = worker_pb2.FromEngine(utility=worker_pb2.UtilityReply(call_id=1))


async def hear(*batches: list[worker_pb2.FromEngine]) -> tuple[list[str | None], str]:
    """Kinds of messages that are passed on, and why the worker is lost. The stream stays open."""
    kinds: list[str | None] = []
    lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    link = WorkerLink(
        "127.0.0.1:1",
        lambda messages: kinds.extend(m.WhichOneof("kind") for m in messages),
        lost.set_result,
    )

    async def stream(requests: Any) -> AsyncIterator[worker_pb2.FromEngineBatch]:
        for number, messages in enumerate(batches, start=1):
            yield worker_pb2.FromEngineBatch(number=number, messages=messages)
        await asyncio.Event().wait()

    link._stub = cast(Any, SimpleNamespace(Engine=stream))
    link.start()
    try:
        async with asyncio.timeout(5):
            return kinds, await lost
    finally:
        await link.close()


@pytest.mark.parametrize("batch", [[FAILED], [REPLY, FAILED], [FAILED, REPLY]])
async def test_a_failed_engine_is_lost_wherever_it_says_so(
    batch: list[worker_pb2.FromEngine],
) -> None:
    kinds, reason = await hear([REPLY], batch)
    assert kinds.count("utility") == 1 + batch.count(REPLY)
    assert reason == "its engine failed: out of memory"


async def test_a_failure_without_a_word_is_one() -> None:
    silent = worker_pb2.FromEngine(failed=worker_pb2.EngineFailed())
    assert (await hear([silent]))[1] == "its engine failed: "


class DyingWorker(worker_pb2_grpc.WorkerServicer):
    """It takes one message, and is gone."""

    async def Engine(self, requests: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        await anext(requests)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        yield


def tasks_of_calls() -> list[str]:
    """Of gRPC, on this loop, as a client."""
    names = [task.get_coro().__qualname__ for task in asyncio.all_tasks()]  # type: ignore[union-attr]
    return [name for name in names if name.startswith("_StreamRequestMixin")]


async def test_nothing_goes_on_for_a_worker_that_is_lost() -> None:
    """Nor does it wait for something to say to it."""
    server = grpc.aio.server()
    worker_pb2_grpc.add_WorkerServicer_to_server(DyingWorker(), server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    link = WorkerLink(f"127.0.0.1:{port}", lambda messages: None, lost.set_result)
    link.start()
    link.send(worker_pb2.ToEngine(tell_kv=worker_pb2.TellKv()))
    try:
        async with asyncio.timeout(30):
            assert await lost == "UNAVAILABLE: Socket closed"
            await link.close()
            while tasks_of_calls():
                await asyncio.sleep(0.01)
    finally:
        await server.stop(None)
