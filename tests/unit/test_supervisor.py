"""When `baton up` says that it serves."""

from __future__ import annotations

import asyncio

import pytest

from cluster.before_start import StartFailed
from cluster.config import BatonConfig
from cluster.membership import (
    Membership,
    RouterRecord,
    WorkerRecord,
    WorkerState,
)
from cluster.scheduler.view import Pool
from cluster.supervisor import Supervisor

POLLS_S = 1.0


def starting(membership: Membership, start_deadline_s: float = 60.0) -> Supervisor:
    supervisor = Supervisor(BatonConfig(start_deadline_s=start_deadline_s), lambda _: None)
    supervisor._membership = membership
    return supervisor


async def with_workers(membership: Membership) -> None:
    for pool, state in (
        (Pool.PREFILL, WorkerState.READY),
        (Pool.DECODE, WorkerState.READY),
        (Pool.DECODE, WorkerState.LOADING),
    ):
        record = WorkerRecord(f"{pool}-{state}", "1", pool, state)
        await membership.put_worker(record)


async def test_a_router_serves_with_all_that_are_ready(membership: Membership) -> None:
    supervisor = starting(membership)
    await with_workers(membership)
    # Other routers of this cluster are others' business.
    await membership.put_router(RouterRecord("other", "", 1, workers=0))
    (router_id,) = supervisor._router_ids
    serving = asyncio.create_task(supervisor._routers_ready())
    for linked in (None, 0, 1):
        if linked is not None:
            await membership.put_router(RouterRecord(router_id, "", 1, linked))
        done, _ = await asyncio.wait({serving}, timeout=POLLS_S)
        assert not done, f"it does not wait with {linked} workers"
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    supervisor.config = supervisor.config.model_copy(
        update={"port": server.sockets[0].getsockname()[1]}
    )
    await membership.put_router(RouterRecord(router_id, "", 1, 2))
    await asyncio.wait_for(serving, 10)
    server.close()


async def test_it_says_what_a_router_lacks(membership: Membership) -> None:
    supervisor = starting(membership, start_deadline_s=0.1)
    await with_workers(membership)
    (router_id,) = supervisor._router_ids
    with pytest.raises(StartFailed, match=f"{router_id} does not serve after 0.1 s"):
        await supervisor._routers_ready()
    await membership.put_router(RouterRecord(router_id, "", 1, 1))
    with pytest.raises(StartFailed, match=f"{router_id} reaches 1 of 2 workers after 0.1 s"):
        await supervisor._routers_ready()
