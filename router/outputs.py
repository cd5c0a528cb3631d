"""What goes to vLLM's front end, and in how large pieces while this process is behind.

The front end turns all of a request's tokens that are there into one event for its client. vLLM's
own client of an engine core reads every message that has come before the front end runs again; a
gRPC stream has one ready at a time. So when the loop takes long to pass outputs on, the next ones
wait for those right behind them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from vllm.v1.engine import EngineCoreOutputs

BEHIND_S = 0.002
"""Takes the loop longer than that to pass outputs on, it is behind."""
HOLD_S = 0.001
"""For the next message: longer than reading one takes, if it is there already."""
HELD_MAX = 8
"""Messages that wait for another."""
TURNS = 5
"""Of the loop, until clients have been sent what was put."""


class Outputs:
    """To be used on one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # Bounded by the outputs of the requests in flight.
        self._queue: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()
        self._held: list[EngineCoreOutputs] = []
        self._release_at: asyncio.TimerHandle | None = None
        self._lag_s = 0.0

    def put(self, outputs: EngineCoreOutputs) -> None:
        self._held.append(outputs)
        if self._release_at is not None:
            self._release_at.cancel()
            self._release_at = None
        if self._lag_s < BEHIND_S or len(self._held) >= HELD_MAX:
            self._release()
        else:
            loop = asyncio.get_running_loop()
            self._release_at = loop.call_later(HOLD_S, self._release)

    async def get(self) -> EngineCoreOutputs:
        return await self._queue.get()

    def _release(self) -> None:
        self._release_at = None
        for outputs in self._held:
            self._queue.put_nowait(outputs)
        self._held.clear()
        self._measure(self._clock(), TURNS)

    def _measure(self, since_s: float, turns: int) -> None:
        if turns:
            asyncio.get_running_loop().call_soon(self._measure, since_s, turns - 1)
        else:
            self._lag_s = self._clock() - since_s
