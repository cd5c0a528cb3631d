"""Adapters that come and go at one router are known to all, whatever happens to Redis."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import Any

import pytest
from vllm.lora.request import LoRARequest
from vllm.utils.counter import AtomicCounter

from cluster.membership import AdapterRecord, Membership
from router.adapters import SharedAdapters


class SharedRedis(Membership):
    """What all routers' memberships of a test write and read."""

    def __init__(self) -> None:
        self.records: dict[str, AdapterRecord] = {}
        self.gone = False

    async def adapters(self) -> dict[str, AdapterRecord]:
        if self.gone:
            raise ConnectionError
        return dict(self.records)

    async def _put_adapter(self, name: str, decide: Any) -> AdapterRecord:
        if self.gone:
            raise ConnectionError
        record: AdapterRecord = decide(self.records.get(name))
        self.records[name] = record
        return record


class Models:
    """As much of vLLM's as is used."""

    def __init__(self, static: dict[str, str]) -> None:
        self.lora_id_counter = AtomicCounter(0)
        self.lora_requests = {name: self.request(name, path) for name, path in static.items()}
        self.lora_resolver_lock: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def request(self, name: str, path: str, load_inplace: bool = False) -> LoRARequest:
        return LoRARequest(name, self.lora_id_counter.inc(1), path, load_inplace=load_inplace)

    async def load_lora_adapter(self, name: str, path: str, load_inplace: bool = False) -> str:
        self.lora_requests[name] = self.request(name, path, load_inplace)
        return "loaded"

    async def unload_lora_adapter(self, name: str) -> str:
        del self.lora_requests[name]
        return "unloaded"

    async def resolve_lora(self, lora_name: str) -> LoRARequest | str:
        return self.lora_requests.get(lora_name, "not found")


class Router:
    def __init__(self, redis: SharedRedis, **static: str) -> None:
        self.models = Models(static)
        self.known: list[str] = []
        self.loaded_anew: list[str] = []
        self.adapters = SharedAdapters(redis, self.models, self)
        self.adapters.attach()

    def know_lora(self, lora_request: LoRARequest) -> None:
        self.known.append(lora_request.lora_name)

    async def add_lora_async(self, lora_request: LoRARequest) -> bool:
        self.loaded_anew.append(lora_request.lora_name)
        return True

    @property
    def listed(self) -> dict[str, str]:
        return {name: lora.lora_path for name, lora in self.models.lora_requests.items()}


@pytest.fixture
def redis() -> SharedRedis:
    return SharedRedis()


async def test_what_one_loads_and_unloads_all_do(redis: SharedRedis) -> None:
    one, other = Router(redis), Router(redis)
    assert await one.models.load_lora_adapter("c", "/c") == "loaded"
    await other.adapters.share()
    assert other.listed == {"c": "/c"} and other.known == ["c"]
    assert await other.models.unload_lora_adapter("c") == "unloaded"
    await one.adapters.share()
    assert one.listed == other.listed == {}
    # And again, from another place.
    await other.models.load_lora_adapter("c", "/c2")
    await one.adapters.share()
    assert one.listed == {"c": "/c2"} and not one.loaded_anew


async def test_one_that_is_asked_for_is_looked_for(redis: SharedRedis) -> None:
    one, other = Router(redis), Router(redis)
    await one.models.load_lora_adapter("c", "/c")
    found = await other.models.resolve_lora("c")
    assert isinstance(found, LoRARequest) and found.lora_path == "/c"
    assert await other.models.resolve_lora("d") == "not found"


async def test_a_later_router_learns_of_all(redis: SharedRedis) -> None:
    one = Router(redis, a="/a", b="/b")
    await one.adapters.share()
    # Those that the arguments name are every router's, and are not told.
    assert not redis.records
    await one.models.load_lora_adapter("c", "/c")
    await one.models.unload_lora_adapter("a")
    late = Router(redis, a="/a", b="/b")
    await late.adapters.share()
    assert late.listed == {"b": "/b", "c": "/c"}


async def test_new_weights_go_to_workers_that_another_router_uses(redis: SharedRedis) -> None:
    one, other = Router(redis), Router(redis)
    await one.models.load_lora_adapter("c", "/c")
    await other.adapters.share()
    number = other.models.lora_requests["c"].lora_int_id
    await one.models.load_lora_adapter("c", "/c", load_inplace=True)
    await other.adapters.share()
    assert other.loaded_anew == ["c"]
    assert other.models.lora_requests["c"].lora_int_id == number
    await other.adapters.share()
    assert other.loaded_anew == ["c"]


async def test_without_redis_each_goes_on(redis: SharedRedis) -> None:
    one, other = Router(redis), Router(redis)
    await one.models.load_lora_adapter("c", "/c")
    await other.adapters.share()
    redis.gone = True
    assert await one.models.load_lora_adapter("d", "/d") == "loaded"
    assert await other.models.resolve_lora("d") == "not found"
    assert one.listed == {"c": "/c", "d": "/d"} and other.listed == {"c": "/c"}
    redis.gone = False
    for router in (one, other):
        await router.adapters.share()
    assert one.listed == other.listed == {"c": "/c", "d": "/d"}


async def test_what_redis_lost_is_told_again(redis: SharedRedis) -> None:
    one, other = Router(redis, a="/a"), Router(redis, a="/a")
    await one.models.load_lora_adapter("c", "/c")
    await one.models.unload_lora_adapter("a")
    await other.adapters.share()
    redis.records.clear()
    for router in (other, one):
        await router.adapters.share()
        assert router.listed == {"c": "/c"}
    late = Router(redis, a="/a")
    await late.adapters.share()
    assert late.listed == {"c": "/c"}


async def test_of_two_changes_all_keep_the_later(redis: SharedRedis) -> None:
    """Both made while Redis was away, or before one heard of the other."""
    one, other = Router(redis), Router(redis)
    redis.gone = True
    await one.models.load_lora_adapter("c", "/one")
    await other.models.load_lora_adapter("c", "/other")
    redis.gone = False
    for router in (one, other, one):
        await router.adapters.share()
    assert one.listed == other.listed == {"c": "/other"}
    assert redis.records["c"].number == 2
