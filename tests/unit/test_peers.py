"""Routers over the same workers: what each placed is seen by the others, once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from cluster.membership import Membership, RouterRecord
from cluster.scheduler.policies.splitwise import Splitwise
from cluster.scheduler.policy import Ask
from cluster.scheduler.scheduler import Scheduler
from cluster.scheduler.view import PlacedLoad, Pool, WorkerKey, WorkerView
from router.peers import Peers, from_json, to_json

P0, P1 = WorkerKey("p0", "a"), WorkerKey("p1", "a")
D0, D1 = WorkerKey("d0", "a"), WorkerKey("d1", "a")


class SharedRedis(Membership):
    """What all routers' memberships of a test write and read."""

    def __init__(self) -> None:
        self.lease_s = 2.4
        self.ids: list[str] = []
        self.told: dict[str, str] = {}
        self.writes = 0
        self.gone = False

    async def routers(self) -> list[RouterRecord]:
        if self.gone:
            raise ConnectionError
        return [RouterRecord(router_id, "", 0) for router_id in self.ids]

    async def exchange_loads(
        self, router_id: str, own: str | None, others: Sequence[str]
    ) -> list[str | bytes | None]:
        if self.gone:
            raise ConnectionError
        if own is not None:
            self.told[router_id] = own
            self.writes += 1
        return [self.told.get(other) for other in others]


class Router:
    def __init__(self, name: str, shared: SharedRedis) -> None:
        self.now_s = 0.0
        self.scheduler = Scheduler(Splitwise(), new_id=lambda: "x")
        self.peers = Peers(shared, self.scheduler, name, lambda: self.now_s)
        for key in (P0, P1, D0, D1):
            pool = Pool.PREFILL if key[0].startswith("p") else Pool.DECODE
            self.scheduler.on_worker_up(WorkerView(key, pool, "m", 4096, kv_tokens=100_000))
        shared.ids.append(name)

    def exchange(self) -> None:
        """One turn of its loop."""

        async def turn() -> None:
            task = asyncio.create_task(self.peers.run())
            await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        self.now_s += 1.0
        asyncio.run(turn())

    def place(self, request_id: str, tokens: int = 100) -> tuple[WorkerKey, WorkerKey]:
        self.scheduler.on_arrival(Ask(request_id, tokens, 10), self.now_s)
        placement = self.scheduler.lives[request_id].placement
        assert placement is not None
        return placement.prefill, placement.decode

    def view(self, key: WorkerKey) -> WorkerView:
        return self.scheduler.view.workers[key]


@pytest.fixture
def shared() -> SharedRedis:
    return SharedRedis()


def test_a_router_goes_where_the_other_has_placed_nothing(shared: SharedRedis) -> None:
    one, other = Router("r1", shared), Router("r2", shared)
    assert one.place("a") == (P0, D0)
    one.exchange()
    other.exchange()
    assert other.place("b") == (P1, D1)


def test_what_ends_is_given_back_and_nobody_counts_twice(shared: SharedRedis) -> None:
    one, other = Router("r1", shared), Router("r2", shared)
    one.place("a", 100)
    for _ in range(3):
        one.exchange()
        other.exchange()
    assert other.view(D0).decode_tokens == other.view(P0).pending_prompt_tokens == 100
    assert one.view(D0).decode_tokens == 100
    assert other.scheduler.own_load() == {}
    assert one.view(D0).own == PlacedLoad(decodes=1, decode_tokens=100)
    one.scheduler.on_abort("a")
    one.exchange()
    other.exchange()
    assert not any(any(worker.others) for worker in other.scheduler.view.workers.values())
    assert other.view(D0).decode_tokens == other.view(P0).prefills == 0


def test_a_routers_load_goes_with_it(shared: SharedRedis) -> None:
    one, other = Router("r1", shared), Router("r2", shared)
    one.place("a")
    one.exchange()
    other.exchange()
    shared.ids.remove("r1")
    other.exchange()
    assert other.place("b") == (P0, D0)


def test_without_redis_what_was_said_holds_for_one_lease(shared: SharedRedis) -> None:
    one, other = Router("r1", shared), Router("r2", shared)
    one.place("a")
    one.exchange()
    other.exchange()
    shared.gone = True
    other.exchange()
    assert any(other.view(D0).others)
    other.now_s += 2.4
    other.exchange()
    assert not any(other.view(D0).others)


def test_a_worker_that_comes_later_brings_what_others_have_there(shared: SharedRedis) -> None:
    one, other = Router("r1", shared), Router("r2", shared)
    late = WorkerKey("d2", "a")
    for router in (one, other):
        router.exchange()
    view = WorkerView(late, Pool.DECODE, "m", 4096, kv_tokens=100_000)
    one.scheduler.on_worker_up(view)
    view.decode_tokens += 70
    one.exchange()
    other.exchange()
    other.scheduler.on_worker_up(WorkerView(late, Pool.DECODE, "m", 4096, kv_tokens=100_000))
    assert other.view(late).decode_tokens == 70


def test_alone_it_writes_nothing(shared: SharedRedis) -> None:
    one = Router("r1", shared)
    one.place("a")
    one.exchange()
    assert shared.writes == 0


def test_what_another_version_says_is_not_understood_and_does_no_harm() -> None:
    load = {D0: PlacedLoad(decodes=2, lent=1)}
    assert from_json(to_json(load)) == load
    assert from_json(to_json(load).replace("lent", "borrowed")) == {}
