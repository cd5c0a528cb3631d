"""How routers end while they answer, over workers without a model."""

from __future__ import annotations

import dataclasses
import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import redis

from tests.integration.failing_router import FILE
from tests.integration.streams import Stream
from tests.integration.stubs import DEADLINE_S, stub_workers
from tests.nursery import Nursery
from tests.processes import (
    Cluster,
    Process,
    wait_for_workers,
    wait_until_serving,
)

TOKENS_MANY = 2000


@pytest.fixture(scope="module")
def stubs(
    tmp_path_factory: pytest.TempPathFactory, vllm_args: list[str], nursery: Nursery
) -> Iterator[Cluster]:
    """Each test has a router of its own."""
    with stub_workers(tmp_path_factory.mktemp("stopping"), vllm_args, nursery) as cluster:
        yield cluster


RouterOf = Callable[..., tuple[str, Process]]


@pytest.fixture
def router_of(stubs: Cluster) -> Iterator[RouterOf]:
    def start(*vllm_args: str) -> tuple[str, Process]:
        stubs.vllm_args, before = [*stubs.vllm_args, *vllm_args], stubs.vllm_args
        url, router = stubs.start_another_router()
        stubs.vllm_args = before
        wait_until_serving(url, router)
        wait_for_workers(stubs, 2, url)
        return url, router

    yield start
    stubs.stop()


def started(url: str, tokens: int) -> Stream:
    """A stream that has had its first tokens."""
    body = {"model": "m", "prompt": "a b c", "max_tokens": tokens, "ignore_eos": True}
    stream = Stream(url, body)
    stream.start()
    wait_until(lambda: len(stream.token_ids) > 2 or not stream.is_alive())
    return stream


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def refuses_connections(url: str) -> bool:
    port = int(url.rsplit(":", 1)[1])
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def is_member(stubs: Cluster, pid: int) -> bool:
    client = redis.Redis.from_url(stubs.redis_url)
    records = map(client.get, client.keys("baton:baton:router:*"))
    return pid in [json.loads(record)["pid"] for record in records if record]


def ends(router: Process) -> int:
    return router.popen.wait(DEADLINE_S)


def test_running_answers_end_and_no_more_are_taken(stubs: Cluster, router_of: RouterOf) -> None:
    url, router = router_of("--shutdown-timeout", "600")
    assert is_member(stubs, router.pid)
    stream = started(url, 200)
    router.popen.send_signal(signal.SIGTERM)
    wait_until(lambda: refuses_connections(url))
    wait_until(lambda: not is_member(stubs, router.pid))
    assert stream.is_alive(), stream.problem
    stream.join(DEADLINE_S)
    assert (stream.problem, len(stream.token_ids)) == ("", 200)
    assert ends(router) == 0, router.output()


@pytest.mark.parametrize("way", ["at once", "deadline", "insisted"])
def test_clients_are_told_what_does_not_end(stubs: Cluster, router_of: RouterOf, way: str) -> None:
    timeout = {"at once": "0", "deadline": "1", "insisted": "600"}[way]
    url, router = router_of("--shutdown-timeout", timeout)
    answers: list[httpx.Response] = []

    def ask() -> None:
        body = {"model": "m", "prompt": "a b c", "max_tokens": TOKENS_MANY, "ignore_eos": True}
        answers.append(httpx.post(f"{url}/v1/completions", json=body, timeout=DEADLINE_S))

    asking = threading.Thread(target=ask)
    asking.start()
    streams = [started(url, TOKENS_MANY) for _ in range(3)]
    router.popen.send_signal(signal.SIGTERM)
    if way == "insisted":
        wait_until(lambda: refuses_connections(url))
        assert router.popen.poll() is None
        router.popen.send_signal(signal.SIGINT)
    for stream in streams:
        stream.join(DEADLINE_S)
        assert "Internal server error" in stream.problem
    asking.join(DEADLINE_S)
    (answer,) = answers
    assert answer.status_code == answer.json()["error"]["code"] == 503
    assert "the router stops" in answer.json()["error"]["message"]
    assert ends(router) == 0, router.output()


def stuck_bytes(port: int) -> int:
    """What the kernel has of answers from this port, as the client does not read."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    rows = [line.split() for line in lines]
    queues = [row[4] for row in rows if int(row[1].split(":")[1], 16) == port]
    return sum(int(queue.split(":")[0], 16) for queue in queues)


def test_a_client_that_does_not_read_holds_up_nothing(stubs: Cluster, router_of: RouterOf) -> None:
    url, router = router_of()
    port = int(url.rsplit(":", 1)[1])
    body = json.dumps(
        {"model": "m", "prompt": ["a"] * 400, "max_tokens": TOKENS_MANY, "stream": True}
    )
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        assert client.recv(100)
        stuck: list[int] = []

        def no_more_goes() -> bool:
            time.sleep(0.5)
            stuck.append(stuck_bytes(port))
            return len(stuck) > 1 and stuck[-1] == stuck[-2] > 0

        wait_until(no_more_goes)
        router.popen.send_signal(signal.SIGTERM)
        assert ends(router) == 0, router.output()


@pytest.mark.parametrize("when", ["before it serves", "while it serves"])
def test_what_goes_on_beside_requests_ends_the_router_when_it_ends(
    stubs: Cluster, tmp_path: Path, when: str
) -> None:
    file = tmp_path / "fail"
    failing = dataclasses.replace(
        stubs,
        more_routers=[],
        router_module="tests.integration.failing_router",
        router_environment={FILE: str(file)},
    )
    try:
        if when == "before it serves":
            file.touch()
            _, router = failing.start_another_router()
        else:
            url, router = failing.start_another_router()
            wait_until_serving(url, router)
            wait_for_workers(failing, 2, url)
            stream = started(url, TOKENS_MANY)
            file.touch()
            stream.join(DEADLINE_S)
            assert "Internal server error" in stream.problem
        assert ends(router) == 1
    finally:
        failing.stop()
    said = [line for line in router.output().splitlines() if line.startswith("baton: ")]
    assert said == ["baton: the router's task 'members': KeyError: 'nobody expects it'"]
    assert not is_member(stubs, router.pid)
