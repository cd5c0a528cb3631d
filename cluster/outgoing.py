"""What one end of a stream between router and worker has to say, until it is sent.

All that waits goes in one batch, for a batch costs both ends more than what is in it. Where nothing
waits, each message goes at once. A receiver that is behind may ask that more be gathered: it then
gets the next batch when it has taken the one before.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

GATHER_S = 0.1
"""One that is behind, and does not say what it has taken, gets what there is after this long."""
BATCH_MAX = 256
"""Messages."""
WAITING_MAX = 10_000
"""Messages."""

Message = TypeVar("Message")


class Outgoing(Generic[Message]):
    """To be used on one event loop; one task takes batches."""

    def __init__(self) -> None:
        self._messages: deque[Message] = deque()
        self._changed = asyncio.Event()
        self._closed = False
        self._gathers = False
        self._sent = 0
        """Batches, as is `_taken`."""
        self._taken = 0

    @property
    def waiting(self) -> int:
        """Messages."""
        return len(self._messages)

    def put(self, message: Message) -> None:
        """
        Raises:
            asyncio.QueueFull: too many wait already.
        """
        if len(self._messages) >= WAITING_MAX:
            raise asyncio.QueueFull
        self._messages.append(message)
        if self._may_go():
            self._changed.set()

    def on_taken(self, number: int, gather: bool) -> None:
        """The receiver is done with the batches up to this number."""
        self._taken, self._gathers = number, gather
        self._changed.set()

    def close(self) -> None:
        """What still waits is not sent."""
        self._closed = True
        self._changed.set()

    async def take(self) -> tuple[int, list[Message]] | None:
        """The next batch and its number, counted from 1. None when there will be no more."""
        while not self._closed and not (self._messages and self._may_go()):
            self._changed.clear()
            try:
                async with asyncio.timeout(GATHER_S if self._messages else None):
                    await self._changed.wait()
            except TimeoutError:
                break
        if self._closed:
            return None
        self._sent += 1
        count = min(len(self._messages), BATCH_MAX)
        return self._sent, [self._messages.popleft() for _ in range(count)]

    def _may_go(self) -> bool:
        return not self._gathers or self._taken >= self._sent or len(self._messages) >= BATCH_MAX
