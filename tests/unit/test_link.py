"""What a router makes of the batches of one worker's stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cluster.wire import worker_pb2
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
