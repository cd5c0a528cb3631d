"""Ending tasks."""

from __future__ import annotations

import asyncio

AGAIN_S = 1.0


async def ended(*tasks: asyncio.Task[None]) -> None:
    """Cancel tasks and wait until they have ended, whatever they end with.

    As often as it takes: a client of Redis (redis-py 8.1) that is cancelled while it writes may go
    on as if nothing had been, and whoever waits for its task once would wait for good.
    """
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=AGAIN_S)
    # So that no error counts as never looked at.
    await asyncio.gather(*tasks, return_exceptions=True)
