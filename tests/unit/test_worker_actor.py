"""The actor's answer to SIGTERM, from its start to its end. The worker is a stand-in: only when it
is there, and what it does, matter here."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.membership import DRAINED, STOPPED
from workers.actor import WorkerActor
from workers.settings import WorkerSettings
from workers.worker import Worker

WITHIN_S = 30.0


class StandIn:
    def __init__(self, notice: bool) -> None:
        self.service = SimpleNamespace(failed=asyncio.get_running_loop().create_future())
        self.notice = notice
        self.serving = asyncio.Event()
        self.noticed = asyncio.Event()
        self.ended = asyncio.Event()
        self.stopped = False

    def on_notice(self) -> bool:
        first = self.notice and not self.noticed.is_set()
        self.noticed.set()
        return first

    async def drained(self) -> None:
        self.serving.set()
        await self.ended.wait()

    async def stop(self) -> None:
        self.stopped = True


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs an actor whose worker starts so, and what happens to it."""
    monkeypatch.setattr("workers.actor.prepare_environment", lambda cpu_ids: None)
    monkeypatch.setattr("workers.actor.configure_logs", lambda: None)

    def run_one(
        start: Callable[[], Coroutine[Any, Any, Any]],
        happens: Callable[[], Coroutine[Any, Any, None]],
    ) -> str:
        monkeypatch.setattr(Worker, "start", lambda settings: start())

        async def both() -> str:
            actor = WorkerActor()
            running = asyncio.create_task(
                actor.run(WorkerSettings("decode-0", "a", []).to_json(), 0, 0, 0)
            )
            await happens()
            return await asyncio.wait_for(running, WITHIN_S)

        return asyncio.run(both())

    return run_one


def told_to_end() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_worker_that_loads_ends_at_once(run: Callable[..., str]) -> None:
    loading = asyncio.Event()
    runs_when_called_off: list[bool] = []

    async def start() -> None:
        loading.set()
        try:
            await asyncio.Event().wait()
        finally:
            # What loads on would serve in the end, and nobody would watch it.
            runs_when_called_off.append("WorkerActor.run" in names_of_tasks())

    async def happens() -> None:
        await loading.wait()
        told_to_end()

    assert run(start, happens) == STOPPED
    assert runs_when_called_off == [True]


def names_of_tasks() -> set[str]:
    return {getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()}


@pytest.mark.parametrize(("notice", "signals"), [(False, 1), (True, 2)])
def test_without_a_notice_or_the_second_time_it_ends_at_once(
    run: Callable[..., str], notice: bool, signals: int
) -> None:
    started: asyncio.Queue[StandIn] = asyncio.Queue()
    workers = []

    async def start() -> StandIn:
        workers.append(StandIn(notice))
        started.put_nowait(workers[0])
        return workers[0]

    async def happens() -> None:
        worker = await started.get()
        await worker.serving.wait()
        for _ in range(signals):
            told_to_end()
            await worker.noticed.wait()

    assert run(start, happens) == STOPPED
    assert workers[0].stopped


def test_it_drains_and_ends(run: Callable[..., str]) -> None:
    started: asyncio.Queue[StandIn] = asyncio.Queue()

    async def start() -> StandIn:
        worker = StandIn(notice=True)
        started.put_nowait(worker)
        return worker

    async def happens() -> None:
        worker = await started.get()
        await worker.serving.wait()
        told_to_end()
        await worker.noticed.wait()
        worker.ended.set()

    assert run(start, happens) == DRAINED
