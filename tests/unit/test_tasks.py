from __future__ import annotations

import asyncio

import pytest

from cluster import tasks
from cluster.tasks import ended


async def test_one_that_swallows_a_cancellation_is_cancelled_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tasks, "AGAIN_S", 0.01)
    swallowed = 0

    async def swallow() -> None:
        nonlocal swallowed
        while swallowed < 2:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                swallowed += 1
        await asyncio.sleep(60)

    task = asyncio.create_task(swallow())
    await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await ended(task)
    assert task.cancelled() and swallowed == 2


async def test_errors_are_not_those_of_who_waits() -> None:
    async def fail() -> None:
        raise RuntimeError

    async def finish() -> None:
        return

    tasks = [asyncio.create_task(fail()), asyncio.create_task(finish())]
    await asyncio.sleep(0)
    await ended(*tasks)
    assert all(task.done() for task in tasks)
    await ended()
