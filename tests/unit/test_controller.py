"""What the controller does about workers that serve no more, or with older settings."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import controller
from cluster.config import BUNDLED_MODEL
from cluster.controller import (
    BACKOFF_MAX_S,
    Controller,
    _Slot,
    backoff_after,
)
from cluster.controller_settings import ControllerSettings
from cluster.membership import (
    DRAINED,
    DesiredPools,
    DrainRequest,
    Membership,
    WorkerRecord,
    WorkerState,
)
from cluster.placement_request import Node, WorkerPlacement
from cluster.scheduler.view import Pool
from workers.actor import shares_of_cores

SETTINGS = ControllerSettings(
    cluster="c",
    redis_url="redis://127.0.0.1:1/0",
    lease_s=2.4,
    stuck_after_s=30,
    preemption_notice_s=25,
    model_path=str(BUNDLED_MODEL),
    vllm_args={"prefill": [], "decode": []},
    tensor_parallel={"prefill": 1, "decode": 1},
    handoff={},
    prefill_accelerator=None,
    decode_accelerator=None,
)


class Members(Membership):
    def __init__(self) -> None:
        self.records: dict[str, WorkerRecord] = {}
        self.drains: list[str] = []
        self.gone = False
        self.started_unix_s = 0.0

    async def start_time(self, now_unix_s: float) -> float:
        if self.gone:
            raise ConnectionError
        return max(now_unix_s, self.started_unix_s)

    async def workers(self) -> list[WorkerRecord]:
        if self.gone:
            raise ConnectionError
        return list(self.records.values())

    async def put_worker(self, record: WorkerRecord) -> None:
        self.records[record.worker_id] = record

    async def ask_drain(self, worker_id: str, request: DrainRequest, keep_s: float) -> None:
        self.drains.append(worker_id)


class Kept(Controller):
    """Two workers, whose processes are only tasks that wait."""

    def __init__(self) -> None:
        super().__init__(SETTINGS.to_json())
        self.members = Members()
        self._membership = self.members
        for worker_id, pool in (("prefill-0", Pool.PREFILL), ("decode-0", Pool.DECODE)):
            self._slots[worker_id] = slot = _Slot(worker_id, pool)
            self.begin(slot)

    def begin(self, slot: _Slot) -> None:
        slot.incarnation, slot.settings = f"{slot.worker_id}.{slot.starts}", self._settings
        slot.starts, slot.drain_asked = slot.starts + 1, False
        slot.task = asyncio.create_task(asyncio.sleep(3600))
        self.tell(slot, WorkerState.READY)

    def tell(self, slot: _Slot, state: WorkerState) -> None:
        self.members.records[slot.worker_id] = WorkerRecord(
            slot.worker_id, slot.incarnation, slot.pool, state
        )

    async def turn(self) -> None:
        await self._look()
        await self._roll()

    def newer_settings(self) -> None:
        self._settings = dataclasses.replace(SETTINGS, vllm_args={"decode": ["-tp", "1"]})


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Seconds that have passed."""
    passed, real = [0.0], time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + passed[0])
    yield passed


def test_without_a_lease_for_long_it_has_lapsed(later: list[float]) -> None:
    async def play() -> None:
        kept = Kept()
        frozen = kept._slots["decode-0"]
        await kept.turn()
        del kept.members.records["decode-0"]
        later[0] += 29
        await kept.turn()
        assert not frozen.lapsed.is_set()
        later[0] += 2
        await kept.turn()
        assert frozen.lapsed.is_set()
        assert not kept._slots["prefill-0"].lapsed.is_set()

    asyncio.run(play())


def test_with_redis_out_of_reach_nobody_lapses(later: list[float]) -> None:
    async def play() -> None:
        kept = Kept()
        await kept.turn()
        kept.members.gone = True
        for _ in range(10):
            later[0] += 29
            await kept.turn()
        kept.members.gone = False
        kept.members.records.clear()
        await kept.turn()
        assert not any(slot.lapsed.is_set() for slot in kept._slots.values())

    asyncio.run(play())


def test_one_that_loads_for_long_has_not_lapsed(later: list[float]) -> None:
    async def play() -> None:
        kept = Kept()
        kept.members.records.clear()
        later[0] += 3600
        await kept.turn()
        assert not any(slot.lapsed.is_set() for slot in kept._slots.values())

    asyncio.run(play())


def test_a_failed_worker_stays_visible_and_a_drained_one_is_no_failure() -> None:
    async def play() -> None:
        kept = Kept()
        kept.members.records.clear()
        for slot, failure in zip(kept._slots.values(), ("it broke", DRAINED), strict=True):
            slot.task, slot.failure = None, failure
        await kept.turn()
        (record,) = kept.members.records.values()
        assert (record.state, record.detail) == (WorkerState.FAILED, "it broke")

    asyncio.run(play())


def test_each_rank_has_a_cpu_and_a_share_of_its_machines_cores() -> None:
    async def play() -> None:
        kept = Kept()
        kept._on_gpu = False
        kept._settings = dataclasses.replace(SETTINGS, tensor_parallel={"prefill": 2, "decode": 1})
        assert [kept._needs(pool).cpus for pool in (Pool.PREFILL, Pool.DECODE)] == [2, 1]
        prefill, decode = kept._slots["prefill-0"], kept._slots["decode-0"]
        assert (kept._share(decode), kept._share(prefill)) == ((0, 1, 3), (1, 2, 3))
        prefill.node = "elsewhere"
        assert (kept._share(decode), kept._share(prefill)) == ((0, 1, 1), (0, 2, 2))
        kept._on_gpu = True
        assert kept._share(prefill)[2] == 0
        needs = kept._needs(Pool.PREFILL)
        assert (needs.accelerators, needs.cpus) == (2, 1)

    asyncio.run(play())


@pytest.mark.parametrize(
    ("first", "shares", "count", "expected"),
    [
        *[(0, 1, 1, [0, 1, 2, 3]), (1, 1, 2, [2, 3]), (0, 2, 3, [0, 1]), (2, 1, 3, [2])],
        # More shares than cores: they have some in common.
        *[(5, 1, 6, [1]), (3, 2, 5, [0, 3]), (0, 8, 8, [0, 1, 2, 3])],
    ],
)
def test_shares_of_cores(
    monkeypatch: pytest.MonkeyPatch, first: int, shares: int, count: int, expected: list[int]
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 1, 0, 2})
    assert shares_of_cores(first, shares, count) == expected


def test_newer_settings_replace_workers_one_by_one() -> None:
    async def play() -> None:
        kept = Kept()
        await kept.turn()
        assert kept.members.drains == []
        kept.newer_settings()
        for _ in range(3):
            await kept.turn()
        assert kept.members.drains == ["prefill-0"]
        first = kept._slots["prefill-0"]
        kept.tell(first, WorkerState.DRAINING)
        await kept.turn()
        kept.begin(first)
        kept.tell(first, WorkerState.LOADING)
        await kept.turn()
        assert kept.members.drains == ["prefill-0"]
        kept.tell(first, WorkerState.READY)
        await kept.turn()
        assert kept.members.drains == ["prefill-0", "decode-0"]
        kept.begin(kept._slots["decode-0"])
        for _ in range(3):
            await kept.turn()
        assert kept.members.drains == ["prefill-0", "decode-0"]

    asyncio.run(play())


class Placing(Kept):
    """It starts workers on nodes that the test says are free."""

    def __init__(self) -> None:
        super().__init__()
        self._desired = DesiredPools(1, 1)

    async def _live(self, slot: _Slot) -> None:
        self.tell(slot, WorkerState.READY)
        await asyncio.sleep(3600)

    def lose(self, *worker_ids: str) -> None:
        for worker_id in worker_ids:
            slot, _ = self._slots[worker_id], self.members.records.pop(worker_id, None)
            slot.task, slot.failure, slot.retry_at_s = None, "its node is gone", 0.0

    def running(self) -> list[str]:
        return [worker_id for worker_id, slot in self._slots.items() if slot.task is not None]


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> list[Node]:
    """Nodes with what they have free."""
    nodes: list[Node] = []
    monkeypatch.setattr(
        controller, "live_nodes", lambda: (nodes, dict.fromkeys([n.id for n in nodes], "10.0.0.1"))
    )
    return nodes


def test_one_without_room_keeps_nobody_else_down(free: list[Node], later: list[float]) -> None:
    async def play() -> None:
        placing = Placing()
        placing.lose("prefill-0", "decode-0")
        free.append(Node("a", None, 0, 1, 1 << 40))
        await placing._reconcile()
        (back,) = placing.running()
        (waits,) = {"prefill-0", "decode-0"} - {back}
        # It can be seen to wait, and is not taken for its former start.
        await placing._look()
        record = placing.members.records[waits]
        assert (record.state, record.incarnation) == (WorkerState.PLACING, "")
        assert "there is room for at most" in record.detail
        assert await placing.problem() == record.detail
        free[0] = dataclasses.replace(free[0], cpus_free=0)
        later[0] += 1
        await placing._reconcile()
        assert placing.running() == [back]
        free[0] = dataclasses.replace(free[0], cpus_free=1)
        later[0] += 1
        await placing._reconcile()
        assert sorted(placing.running()) == ["decode-0", "prefill-0"]
        assert placing.members.records[waits].state is not WorkerState.FAILED
        assert await placing.problem() == ""

    asyncio.run(play())


def test_a_model_that_only_vllm_understands_is_placed(
    free: list[Node], later: list[float], tmp_path: Path
) -> None:
    async def play() -> None:
        (tmp_path / "config.json").write_text('{"model_type": "new"}')
        placing = Placing()
        placing._settings = dataclasses.replace(placing._settings, model_path=str(tmp_path))
        placing.lose("prefill-0", "decode-0")
        free.append(Node("a", "H100", 2, 2, 1 << 40))
        await placing._reconcile()
        assert sorted(placing.running()) == ["decode-0", "prefill-0"]
        placement = placing._slots["decode-0"].placement
        assert placement is not None
        assert "the model's config has no hidden_size" in placement.reason

    asyncio.run(play())


@pytest.mark.parametrize("backs_off", [True, False])
def test_one_that_waits_for_room_does_not_take_a_pools_last(
    free: list[Node], later: list[float], backs_off: bool
) -> None:
    async def play() -> None:
        placing = Placing()
        placing._desired = DesiredPools(1, 2)
        await placing._reconcile()
        assert placing._slots["decode-1"].unplaced
        node = Node("a", None, 0, 1, 1 << 40)
        free.append(node)
        later[0] += 1
        placing.lose("prefill-0")
        placing._slots["prefill-0"].retry_at_s = time.monotonic() + 5 * backs_off
        await placing._reconcile()
        assert ("prefill-0" in placing.running()) is not backs_off
        assert "decode-1" not in placing.running()
        if not backs_off:
            free.clear()
        later[0] += 5
        await placing._reconcile()
        assert sorted(placing.running()) == ["decode-0", "prefill-0"]
        if not backs_off:
            free.append(node)
        # One for which there is no room either keeps nobody from what there is.
        placing.lose("prefill-0")
        placing._slots["prefill-0"].unplaced = "it needs more"
        placing._slots["prefill-0"].retry_at_s = time.monotonic() + 60
        later[0] += 1
        await placing._reconcile()
        assert sorted(placing.running()) == ["decode-0", "decode-1"]

    asyncio.run(play())


def test_a_cluster_starts_whole_or_not_at_all(free: list[Node], later: list[float]) -> None:
    async def play() -> None:
        placing = Placing()
        placing._slots.clear()
        placing.members.records.clear()
        free.append(Node("a", None, 0, 1, 1 << 40))
        await placing._reconcile()
        await placing._look()
        assert placing.running() == [] and placing.members.records == {}
        assert "Asked for 1 prefill workers" in await placing.problem()
        free.append(Node("b", None, 0, 1, 1 << 40))
        later[0] += 1
        await placing._reconcile()
        assert placing.running() == ["prefill-0", "decode-0"]

    asyncio.run(play())


@pytest.mark.parametrize("pin", [None, "H100"])
def test_a_worker_that_ray_places_elsewhere_is_told_its_own_address(
    monkeypatch: pytest.MonkeyPatch, pin: str | None
) -> None:
    nodes = [Node(name, kind, 1, 1, 1 << 40) for name, kind in (("a" * 9, "H100"), ("b" * 9, "L4"))]
    addresses = {"a" * 9: "10.0.0.1", "b" * 9: "10.0.0.2"}
    monkeypatch.setattr(controller, "live_nodes", lambda: (nodes, addresses))
    placed = {"bundles_to_node_id": {0: "a" * 9}}
    monkeypatch.setattr(controller, "placement_group_table", lambda group: placed)

    async def play() -> None:
        kept = Kept()
        kept._settings = dataclasses.replace(SETTINGS, decode_accelerator=pin)
        slot = kept._slots["decode-0"]
        slot.node = "10.0.0.1"
        slot.placement = WorkerPlacement("decode", "a" * 9, "H100", "the fastest")
        kept._see_node(slot)
        assert slot.placement.reason == "the fastest"
        placed["bundles_to_node_id"][0] = "b" * 9
        if pin:
            with pytest.raises(RuntimeError, match="with L4, and it is pinned to H100"):
                kept._see_node(slot)
            return
        kept._see_node(slot)
        told = json.loads(kept._worker_settings(slot))
        assert (told["host"], told["node"], told["accelerator"]) == ("10.0.0.2", "b" * 8, "L4")
        assert "aaaaaaaa was chosen (the fastest)" in told["placement_reason"]

    asyncio.run(play())


def test_a_clock_set_back_makes_no_start_an_earlier_one(
    free: list[Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def play() -> None:
        clock = [0.0]
        monkeypatch.setattr(time, "time", lambda: clock[0])
        placing = Placing()
        free.append(Node("a", None, 0, 2, 1 << 40))
        # Another controller's, by a clock that is ahead.
        placing.members.started_unix_s = 2000.0
        slot, seen = placing._slots["decode-0"], []
        for now, gone in ((1000.0, False), (900.0, True), (800.0, False), (3000.0, True)):
            clock[0], placing.members.gone = now, gone
            placing.lose("decode-0")
            await placing._reconcile()
            seen.append(slot.started_unix_s)
            await asyncio.sleep(0)
        assert seen[0] == 2000.0 and seen[-1] == 3000.0
        assert sorted(set(seen)) == seen

    asyncio.run(play())


def test_the_back_off_grows_up_to_its_bound() -> None:
    assert [backoff_after(starts) for starts in (1, 2, 3)] == [1, 2, 4]
    assert backoff_after(10) == backoff_after(100_000) == BACKOFF_MAX_S
