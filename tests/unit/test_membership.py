"""Workers' records in a real Redis: a former start neither takes nor removes a later one's."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from cluster.membership import (
    AdapterRecord,
    Membership,
    WorkerRecord,
    WorkerState,
    keep_lease,
)
from cluster.scheduler.view import Pool

FORMER = WorkerRecord("w", "i1", Pool.DECODE, WorkerState.READY, started_unix_s=1.0)
LATER = replace(FORMER, incarnation="i2", started_unix_s=2.0)


async def test_a_later_start_takes_the_place_of_a_former_one(membership: Membership) -> None:
    assert await membership.put_worker(FORMER)
    assert await membership.put_worker(LATER)
    assert not await membership.put_worker(replace(FORMER, state=WorkerState.DRAINING))
    assert await membership.workers() == [LATER]


async def test_a_start_writes_its_own_record_again(membership: Membership) -> None:
    assert await membership.put_worker(LATER)
    draining = replace(LATER, state=WorkerState.DRAINING)
    assert await membership.put_worker(draining)
    assert await membership.workers() == [draining]


async def test_only_its_own_record_is_removed(membership: Membership) -> None:
    await membership.put_worker(LATER)
    await membership.remove_worker("w", FORMER.incarnation)
    assert await membership.workers() == [LATER]
    await membership.remove_worker("w", LATER.incarnation)
    assert await membership.workers() == []


async def test_start_times_only_grow(membership: Membership) -> None:
    assert await membership.start_time(100.0) == 100.0
    back = await membership.start_time(50.0)
    assert 100.0 < back < await membership.start_time(50.0) < 101.0
    assert await membership.start_time(1_700_000_000.25) == 1_700_000_000.25


async def test_redis_tells_one_start_from_another(membership: Membership) -> None:
    assert len(await membership.run_id()) > 8
    assert await membership.run_id() == await membership.run_id()


async def test_a_write_that_hangs_is_given_up_and_tried_again() -> None:
    again = asyncio.Event()
    writes = 0

    async def write() -> None:
        nonlocal writes
        writes += 1
        if writes == 1:
            await asyncio.Event().wait()
        again.set()

    lease = asyncio.create_task(keep_lease(write, 0.3, asyncio.Event()))
    await asyncio.wait_for(again.wait(), 60)
    lease.cancel()
    await asyncio.gather(lease, return_exceptions=True)
    assert writes > 1


async def test_the_last_change_of_an_adapter_holds(membership: Membership) -> None:
    loaded = AdapterRecord("c", "/c")
    assert await membership.change_adapter(loaded) == loaded
    # By another router, which had not heard of it.
    other = await membership.change_adapter(AdapterRecord("c", "/other"))
    assert other.number == 2
    await membership.restore_adapter(loaded)
    assert await membership.adapters() == {"c": other}
    await membership.restore_adapter(replace(loaded, number=3))
    assert (await membership.adapters())["c"].path == "/c"
