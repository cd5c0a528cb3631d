"""Pools that cannot be joined: the router's users are told what differs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any, cast

import grpc.aio
import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry

from cluster.fingerprints import why_not_joined
from cluster.membership import WorkerRecord, WorkerState
from cluster.scheduler.policies import PolicyOptions, make_policy
from cluster.scheduler.scheduler import Scheduler
from cluster.scheduler.view import ClusterView, Pool, WorkerKey, WorkerView
from cluster.wire import worker_pb2, worker_pb2_grpc
from router.cluster_core import ClusterCore
from router.dashboard.source import DashboardSource
from router.following import key_of
from router.joining import why_unjoined
from router.metrics import RouterMetrics
from workers.server import WorkerService

FLOAT32 = worker_pb2.Fingerprint(model="m", dtype="float32", layers=3)
BFLOAT16 = worker_pb2.Fingerprint(model="m", dtype="bfloat16", layers=3)
WHY = (
    "KV of prefill-0 would be wrong on decode-0: "
    "dtype is 'float32' at the sender and 'bfloat16' at the receiver"
)
Connect = Callable[[str, worker_pb2.Fingerprint], Awaitable[WorkerRecord]]


@pytest.fixture
def core() -> ClusterCore:
    config = SimpleNamespace(
        cache_config=SimpleNamespace(enable_prefix_caching=False),
        model_config=SimpleNamespace(served_model_name="m", max_model_len=1000),
    )
    scheduler = Scheduler(make_policy("splitwise", PolicyOptions()), new_id=lambda: "x")
    return ClusterCore(cast(Any, config), scheduler, RouterMetrics(CollectorRegistry()), 1.0)


@pytest_asyncio.fixture
async def connect(core: ClusterCore) -> AsyncIterator[Connect]:
    """Links the router to a worker without an engine."""
    servers = []

    async def connect_one(name: str, fingerprint: worker_pb2.Fingerprint) -> WorkerRecord:
        service = WorkerService(asyncio.get_running_loop())
        nothing = SimpleNamespace(tell_kv=lambda client: None, abort=lambda ids: None)
        service.engine = cast(Any, nothing)
        service.description = worker_pb2.WorkerDescription(
            worker_id=name, incarnation="i1", fingerprint=fingerprint, max_model_len_tokens=1000
        )
        server = grpc.aio.server()
        worker_pb2_grpc.add_WorkerServicer_to_server(service, server)  # type: ignore[no-untyped-call]
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        servers.append(server)
        record = WorkerRecord(name, "i1", Pool(name.split("-")[0]), WorkerState.READY, address)
        await core.connect(WorkerKey(name, "i1"), address, lambda: record, lambda reason: None)
        return record

    yield connect_one
    for worker in core.workers.values():
        await worker.link.close()
    for server in servers:
        await server.stop(None)


async def test_a_worker_that_nobody_can_be_joined_with_is_told_of_once(
    core: ClusterCore, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "router"):
        records = [await connect("prefill-0", FLOAT32), await connect("decode-0", BFLOAT16)]
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"decode-0/i1 can be joined to no worker of the other pool: {WHY}"]
    assert core.unjoined() == {key_of(record): WHY for record in records}

    settings = SimpleNamespace(cluster="c", router_id="r")
    watcher = SimpleNamespace(desired={}, redis_reachable=True, records=records)
    rows = DashboardSource(cast(Any, settings), core, cast(Any, watcher)).state().workers
    assert [row.detail for row in rows] == [WHY, WHY]


async def test_workers_that_can_be_joined_are_not_told_of(
    core: ClusterCore, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "router"):
        for name in ("prefill-0", "decode-0", "decode-1"):
            await connect(name, FLOAT32)
    assert not caplog.records and core.unjoined() == {}


def test_one_of_the_other_pool_is_enough() -> None:
    names = {"prefill-0": FLOAT32, "decode-0": FLOAT32, "decode-1": BFLOAT16}
    fingerprints = {WorkerKey(name, "i1"): one for name, one in names.items()}
    view = ClusterView()

    def appear(key: WorkerKey) -> None:
        model = fingerprints[key].SerializeToString().hex()
        view.workers[key] = WorkerView(key, Pool(key.worker_id.split("-")[0]), model, 1000, 1000)
        view.note_models()

    p0, d0, d1 = fingerprints
    appear(d0)
    appear(d1)
    # Nobody is in the other pool.
    assert why_unjoined(fingerprints, view) == {}
    appear(p0)
    assert why_unjoined(fingerprints, view) == {d1: WHY.replace("decode-0", "decode-1")}
    del view.workers[d0]
    assert list(why_unjoined(fingerprints, view)) == [d1, p0]


def test_what_differs_is_told_with_both_values() -> None:
    assert why_not_joined("prefill-0", FLOAT32, "decode-0", FLOAT32) == ""
    assert why_not_joined("prefill-0", FLOAT32, "decode-0", BFLOAT16) == WHY
