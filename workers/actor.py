"""The Ray actor that a worker runs in. The controller starts it by this import path, so that
`cluster` depends on no code of `workers`."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from typing import TYPE_CHECKING, Any

from cluster.logs import configure_logs
from cluster.membership import DRAINED, STOPPED
from workers.environment import prepare_environment
from workers.settings import WorkerSettings

if TYPE_CHECKING:
    from workers.worker import Worker


class WorkerActor:
    """`run` returns only when the worker has failed or was stopped."""

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self._stopped = asyncio.Event()

    async def run(self, settings_json: str, first_share: int, shares: int, share_count: int) -> str:
        """Start the worker and watch it. On a machine without accelerators it keeps to so many
        shares of the cores, from `first_share` on, of `share_count` equal ones (0: all cores).

        Returns:
            Why it ended.
        """
        settings = WorkerSettings.from_json(settings_json)
        if share_count:
            cpu_ids = shares_of_cores(first_share, shares, share_count)
            settings = dataclasses.replace(settings, cpu_ids=cpu_ids)
        prepare_environment(settings.cpu_ids)
        configure_logs()
        # Only now: this imports torch and vLLM, which read the environment.
        from workers.worker import Worker

        self._worker = await Worker.start(settings)
        stopped = asyncio.create_task(self._stopped.wait())
        drained = asyncio.create_task(self._worker.drained())
        failed = self._worker.service.failed
        waits: set[asyncio.Future[Any]] = {stopped, drained, failed}
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        reason = failed.result() if failed.done() else STOPPED
        if drained.done() and not failed.done():
            reason = DRAINED
        for waiting in (stopped, drained):
            waiting.cancel()
        await self._worker.stop()
        return reason

    async def stop(self) -> None:
        self._stopped.set()


def shares_of_cores(first: int, shares: int, count: int) -> list[int]:
    """Where there are fewer cores than shares, workers have cores in common."""
    cores = sorted(os.sched_getaffinity(0))
    size = max(1, len(cores) // count)
    return sorted({cores[i % len(cores)] for i in range(first * size, (first + shares) * size)})
