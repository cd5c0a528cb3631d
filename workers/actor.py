"""The Ray actor that a worker runs in. The controller starts it by this import path, so that
`cluster` depends on no code of `workers`."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import faulthandler
import os
import signal
from collections.abc import Callable
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
        with contextlib.closing(Notice(self._on_notice)):
            return await self._serve(settings)

    async def _serve(self, settings: WorkerSettings) -> str:
        # Only now: this imports torch and vLLM, which read the environment.
        from workers.worker import Worker

        stopped = asyncio.create_task(self._stopped.wait())
        started = asyncio.create_task(Worker.start(settings))
        await asyncio.wait({stopped, started}, return_when=asyncio.FIRST_COMPLETED)
        if not started.done():
            # vLLM cannot be called off, and who started this process kills it. But for that, it
            # would serve in the end, and nobody would watch it.
            started.cancel()
            await asyncio.gather(started, return_exceptions=True)
            return STOPPED
        self._worker = started.result()
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

    def _on_notice(self) -> None:
        # The second time, or with nothing to drain: at once.
        if self._worker is None or not self._worker.on_notice():
            self._stopped.set()


class Notice:
    """Hears SIGTERM. An actor's event loop is not in the process's main thread, where Python lets
    signals be handled, and that thread is inside Ray and would handle none. faulthandler's own
    handler may be set anywhere and writes to a file at once: here that is a pipe."""

    def __init__(self, on_notice: Callable[[], object]) -> None:
        self._on_notice = on_notice
        self._heard, self._writes = os.pipe()
        os.set_blocking(self._heard, False)
        # A full pipe must not hold up the thread that the signal came to.
        os.set_blocking(self._writes, False)
        faulthandler.register(signal.SIGTERM, file=self._writes, all_threads=False)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._heard, self._on_signal)

    def close(self) -> None:
        faulthandler.unregister(signal.SIGTERM)
        self._loop.remove_reader(self._heard)
        os.close(self._heard)
        os.close(self._writes)

    def _on_signal(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self._heard, 1 << 16):
                pass
        self._on_notice()


def shares_of_cores(first: int, shares: int, count: int) -> list[int]:
    """Where there are fewer cores than shares, workers have cores in common."""
    cores = sorted(os.sched_getaffinity(0))
    size = max(1, len(cores) // count)
    return sorted({cores[i % len(cores)] for i in range(first * size, (first + shares) * size)})
