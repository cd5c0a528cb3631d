"""What goes on beside a router's requests. It is to go on, or to end the router: one that neither
places what waits nor drops who is gone looks healthy and is not."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import NoReturn

from cluster.errors import one_line
from cluster.tasks import ended

logger = logging.getLogger(__name__)


class BackgroundFailed(Exception):
    """A task ended that should not have. The message names it and says why."""


class Background:
    def __init__(self) -> None:
        self.tasks: list[asyncio.Task[None]] = []

    def start(self, name: str, work: Coroutine[None, None, None]) -> None:
        self.tasks.append(asyncio.create_task(work, name=name))

    def problem(self) -> BackgroundFailed | None:
        """That one has ended."""
        for task in self.tasks:
            if task.done():
                error = None if task.cancelled() else task.exception()
                logger.error("the task %r has ended", task.get_name(), exc_info=error)
                why = "it ended" if error is None else f"{type(error).__name__}: {one_line(error)}"
                return BackgroundFailed(f"the router's task {task.get_name()!r}: {why}")
        return None

    async def end(self) -> None:
        await ended(*self.tasks)


async def repeat(turn: Callable[[], Awaitable[None]], pause_s: float) -> NoReturn:
    """Until cancelled. A turn that fails is told, once if others fail alike, and the next one is
    tried."""
    told = ""
    while True:
        try:
            await turn()
            told = ""
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            if text != told:
                logger.exception("it goes on after: %s", text)
            told = text
        await asyncio.sleep(pause_s)
