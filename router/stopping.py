"""How a router ends: it takes no more requests, those that run have until a deadline to end, and
the clients of what is left by then are told so. A second signal is the deadline."""

from __future__ import annotations

import asyncio
import logging
import signal
from typing import Any

import uvicorn

from router.cluster_core import ClusterCore

logger = logging.getLogger(__name__)

FAREWELL_S = 1.0
"""For clients to read the last of their answers."""


class StopSignals:
    """SIGINT and SIGTERM. A third one does what it does by default."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.insisted = asyncio.Event()

    def listen(self) -> None:
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, self._on_signal)

    def _on_signal(self) -> None:
        if self.asked.is_set():
            self.insisted.set()
            loop = asyncio.get_running_loop()
            for signum in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(signum)
        self.asked.set()


async def first_of(*waited: asyncio.Future[Any], timeout_s: float | None = None) -> None:
    await asyncio.wait(waited, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)


async def end_serving(
    serving: asyncio.Task[Any],
    server: uvicorn.Server,
    core: ClusterCore,
    insisted: asyncio.Event,
    timeout_s: float,
) -> None:
    """Returns when there is no request left, or no way to end it."""
    # It closes its socket and the idle connections, and ends after the last request.
    server.should_exit = True
    if timeout_s > 0 and not serving.done():
        logger.info("running requests have %g s to end", timeout_s)
        waiting = asyncio.create_task(insisted.wait())
        await first_of(serving, waiting, timeout_s=timeout_s)
        waiting.cancel()
    core.refuse_all("the router stops")
    await first_of(serving, timeout_s=FAREWELL_S)
    if not serving.done():
        # Their clients don't read.
        for connection in list(server.server_state.connections):
            connection.transport.abort()
        await first_of(serving, timeout_s=FAREWELL_S)
