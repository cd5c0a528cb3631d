"""What goes on beside requests goes on, or is seen to have ended."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry

from cluster.membership import Membership, WorkerRecord, WorkerState
from cluster.scheduler.policies import PolicyOptions, make_policy
from cluster.scheduler.scheduler import Scheduler
from cluster.scheduler.view import Pool, WorkerKey
from router.background import Background, repeat
from router.members import MemberWatcher
from router.metrics import RouterMetrics


async def test_a_turn_that_fails_is_told_once_and_the_next_ones_come(
    caplog: pytest.LogCaptureFixture,
) -> None:
    turns, enough = 0, asyncio.Event()

    async def turn() -> None:
        nonlocal turns
        turns += 1
        if turns == 8:
            enough.set()
        if turns not in (4, 7):
            raise KeyError("the same" if turns < 6 else "another")

    background = Background()
    background.start("turns", repeat(turn, 0.0))
    await asyncio.wait_for(enough.wait(), 60)
    assert background.problem() is None
    await background.end()
    # Turns 1, 5 after a good one, 6 for another reason, and 8.
    assert len(caplog.records) == 4


async def test_a_task_that_ends_is_named_with_its_error() -> None:
    async def fails() -> None:
        raise TypeError("an int\nis no str")

    background = Background()
    background.start("goes on", asyncio.Event().wait())
    background.start("fails", fails())
    await asyncio.wait(background.tasks, return_when=asyncio.FIRST_COMPLETED)
    problem = background.problem()
    assert str(problem) == "the router's task 'fails': TypeError: an int is no str"
    await background.end()


class Core:
    """Whose first steps fail."""

    def __init__(self) -> None:
        self.scheduler = Scheduler(make_policy("splitwise", PolicyOptions()), new_id=lambda: "x")
        self.ticks = 0
        self.linked: list[WorkerKey] = []
        self.connected = asyncio.Event()

    def tick(self) -> None:
        self.ticks += 1
        if self.ticks == 1:
            raise ZeroDivisionError

    async def connect(self, key: WorkerKey, *others: Any) -> None:
        self.linked.append(key)
        if len(self.linked) == 1:
            raise TypeError("an answer that nobody expects")
        self.connected.set()


async def test_the_member_watcher_goes_on_after_what_it_does_not_expect(
    membership: Membership,
) -> None:
    core = Core()
    watcher = MemberWatcher(membership, cast(Any, core), RouterMetrics(CollectorRegistry()))
    await membership.put_worker(WorkerRecord("w", "i", Pool.DECODE, WorkerState.READY))
    background = Background()
    background.start("members", watcher.run())
    await asyncio.wait_for(core.connected.wait(), 60)
    assert core.ticks > 1 and background.problem() is None
    await background.end()
