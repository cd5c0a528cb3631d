"""What the controller and `baton up` share of Ray, without importing it: that takes a second."""

from __future__ import annotations

from typing import Any

NAMESPACE = "baton"
WORKER_ACTOR = "workers.actor:WorkerActor"


async def awaited(ref: Any) -> Any:
    """An ObjectRef as a coroutine, which asyncio.wait_for can bound."""
    return await ref
