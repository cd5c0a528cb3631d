"""Workers' records in a real Redis: a former start neither takes nor removes a later one's."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest

from cluster.membership import (
    AdapterRecord,
    DesiredPools,
    DrainRequest,
    Membership,
    RouterRecord,
    WorkerRecord,
    WorkerState,
    keep_lease,
    open_redis,
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


async def test_what_a_newer_version_writes_is_read_without_what_only_it_knows(
    membership: Membership, redis_url: str
) -> None:
    values = {**json.loads(LATER.to_json()), "mood": "good"}
    router = {"router_id": "r", "url": "u", "pid": 1, "mood": "good"}
    adapter = {"name": "a", "path": "p", "mood": "good"}
    async with open_redis(redis_url) as client:
        await client.set("baton:c:worker:w", json.dumps(values))
        await client.set("baton:c:router:r", json.dumps(router))
        await client.hset("baton:c:adapters", "a", json.dumps(adapter))
        await client.set("baton:c:desired", '{"prefill": 1, "decode": 2, "mood": 3}')
        await client.set("baton:c:drain:w", '{"incarnation": "i2", "until_unix_s": 5, "mood": 3}')
    assert await membership.workers() == [LATER]
    assert await membership.routers() == [RouterRecord("r", "u", 1)]
    assert await membership.adapters() == {"a": AdapterRecord("a", "p")}
    assert await membership.desired() == DesiredPools(1, 2)
    assert await membership.drain_asked("w") == DrainRequest("i2", 5)


UNREADABLE = ("{", "[]", "3", "{}", LATER.to_json().replace('"ready"', '"resting"'))


async def test_what_cannot_be_read_is_left_out_and_said_once(
    membership: Membership, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    await membership.put_worker(LATER)
    async with open_redis(redis_url) as client:
        for number, text in enumerate(UNREADABLE):
            await client.set(f"baton:c:worker:{number}", text)
        await client.set("baton:c:router:r", "{}")
        await client.hset("baton:c:adapters", "a", "{}")
        await client.set("baton:c:desired", "{}")
    for _ in range(2):
        assert await membership.workers() == [LATER]
        assert await membership.routers() == []
        assert await membership.adapters() == {}
        assert await membership.desired() is None
    assert len(caplog.messages) == len(UNREADABLE) + 3
    # Its worker writes it anew.
    record = replace(LATER, worker_id="0")
    assert await membership.put_worker(record)
    assert record in await membership.workers()
