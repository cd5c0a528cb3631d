"""A thousand requests of random lengths, many of them given up at a random point of their lives,
while workers are killed at random: what is answered is right, and in the end nothing is held."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
import httpx
import pytest

from cluster.membership import Membership, WorkerRecord, WorkerState, open_redis
from cluster.wire import worker_pb2, worker_pb2_grpc
from tests.integration.test_equal_to_plain_vllm import ask, prompt_of
from tests.processes import Cluster, metrics, running_cluster

SEED = 20_261
REQUESTS = 1000
AT_ONCE = 12
PROMPTS = 40
OUTPUT_TOKENS_MAX = 20
GIVE_UP = 0.3
"""Share of the requests that their client gives up."""
GIVE_UP_WITHIN_S = 0.5
KILL_EVERY = 200
"""Requests."""
SETTLE_S = 60.0
"""Also for a worker to come back that a busy machine kept from renewing its lease."""
POOL_OF = {"prefill-0": "prefill", "decode-1": "decode", "decode-2": "decode"}


@pytest.fixture(scope="module")
def soaked(tmp_path_factory: pytest.TempPathFactory, vllm_args: list[str]) -> Iterator[Cluster]:
    # A transfer of 32 KB or more is pushed layer by layer, a shorter one in one go.
    handoff = {"one_go_ms": 0.1}
    folder = tmp_path_factory.mktemp("soaked")
    with running_cluster(folder, vllm_args, prefill=1, decode=2, handoff=handoff) as cluster:
        yield cluster


@dataclass
class Soak:
    cluster: Cluster
    bodies: list[dict[str, Any]]
    expected: list[list[int]]
    """Token ids, as many as a request may ask for."""
    random: random.Random = field(default_factory=lambda: random.Random(SEED))
    ended: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    async def run(self) -> None:
        turns = asyncio.Semaphore(AT_ONCE)
        async with httpx.AsyncClient(timeout=120) as client, asyncio.TaskGroup() as tasks:
            back: asyncio.Task[None] | None = None
            for number in range(REQUESTS):
                await turns.acquire()
                task = tasks.create_task(self.one(client, number))
                task.add_done_callback(lambda _: turns.release())
                if number % KILL_EVERY == KILL_EVERY // 2:
                    if back is not None:
                        await back
                    back = tasks.create_task(self.kill_one())

    async def one(self, client: httpx.AsyncClient, number: int) -> None:
        which = self.random.randrange(PROMPTS)
        tokens = self.random.randint(1, OUTPUT_TOKENS_MAX)
        body = {**self.bodies[which], "max_tokens": tokens, "stream": True}
        if self.random.random() < 0.5:
            # Nobody's prefix cache knows it.
            body["cache_salt"] = str(number)
        give_up_s = None
        if self.random.random() < GIVE_UP:
            give_up_s = self.random.uniform(0, GIVE_UP_WITHIN_S)
        said: list[int] = []
        try:
            async with asyncio.timeout(give_up_s):
                problem = await self.stream(client, body, said)
        except TimeoutError:
            self.ended["given up"] += 1
            problem = ""
        else:
            self.ended["answered"] += 1
            if not problem and len(said) != tokens:
                problem = f"{len(said)} tokens instead of {tokens}"
        if said != self.expected[which][: len(said)]:
            problem = f"{said} is not the beginning of {self.expected[which]}"
        if problem:
            self.wrong.append(f"request {number}, prompt {which}: {problem}")

    async def stream(self, client: httpx.AsyncClient, body: dict[str, Any], said: list[int]) -> str:
        """Returns what went wrong."""
        url = f"{self.cluster.url}/v1/completions"
        async with client.stream("POST", url, json=body) as response:
            async for line in response.aiter_lines():
                if response.status_code != 200:
                    return f"{response.status_code} {line}"
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        return str(event["error"])
                    for choice in event["choices"]:
                        said += choice["token_ids"] or []
        return ""

    async def kill_one(self) -> None:
        """And start it anew; returns when the router has it."""
        name = self.random.choice(sorted(self.cluster.workers))
        self.cluster.workers.pop(name).stop(signal.SIGKILL)
        self.cluster.start_worker(name, POOL_OF[name], [int(name != "prefill-0")])
        self.ended["killed"] += 1
        until = time.monotonic() + 120
        while (await workers_in_reach(self.cluster))[name] != self.incarnation(name):
            assert time.monotonic() < until, f"{name} does not come back"
            await asyncio.sleep(0.2)

    def incarnation(self, name: str) -> str:
        command = self.cluster.workers[name].popen.args
        assert isinstance(command, list)
        return str(json.loads(command[-1])["incarnation"])


async def workers_in_reach(cluster: Cluster) -> dict[str, str]:
    """Incarnations by worker, as the router sees them."""
    async with httpx.AsyncClient() as client:
        state = (await client.get(f"{cluster.url}/dashboard/state")).json()
    found = dict.fromkeys(POOL_OF, "")
    return found | {row["worker_id"]: row["incarnation"] for row in state["workers"]}


async def ready_workers(cluster: Cluster) -> list[WorkerRecord]:
    redis = open_redis(cluster.redis_url)
    try:
        records = await Membership(redis, "baton", 2.4).workers()
    finally:
        await redis.aclose()
    return [record for record in records if record.state is WorkerState.READY]


async def holdings(address: str) -> dict[str, int]:
    """What a worker holds, without its connections."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)  # type: ignore[no-untyped-call]
        held = await stub.Hold(worker_pb2.HoldRequest(), timeout=5)
    fields = {field.name: getattr(held, field.name) for field, _ in held.ListFields()}
    return {name: value for name, value in fields.items() if name not in ("peers", "tasks")}


async def held_by_all(cluster: Cluster) -> dict[str, dict[str, int]]:
    """Only of those that hold something, or are not there."""
    held: dict[str, dict[str, int]] = {name: {"missing": 1} for name in POOL_OF}
    for record in await ready_workers(cluster):
        held[record.worker_id] = await holdings(record.address)
    return {name: what for name, what in held.items() if what}


def test_nothing_is_held_and_nothing_wrong_after_a_thousand_requests(
    soaked: Cluster, plain: str
) -> None:
    lengths = random.Random(SEED)
    bodies = [
        {
            "model": "m",
            "prompt": prompt_of(lengths.randint(2, 450), 50_000 + i),
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        for i in range(PROMPTS)
    ]
    expected = [
        ask(plain, "/v1/completions", {**body, "max_tokens": OUTPUT_TOKENS_MAX})[1]["choices"][0][
            "token_ids"
        ]
        for body in bodies
    ]
    soak = Soak(soaked, bodies, expected)
    asyncio.run(soak.run())
    assert not soak.wrong, "\n".join(soak.wrong[:20])
    assert soak.ended["answered"] + soak.ended["given up"] == REQUESTS
    assert soak.ended["given up"] > REQUESTS * GIVE_UP / 4
    assert soak.ended["killed"] == REQUESTS // KILL_EVERY
    assert metrics(soaked.url)["baton_handoffs_completed_total"] > REQUESTS / 4

    until = time.monotonic() + SETTLE_S
    while held := asyncio.run(held_by_all(soaked)):
        assert time.monotonic() < until, f"still held: {held}"
        time.sleep(0.2)
    state = httpx.get(f"{soaked.url}/dashboard/state").json()
    assert state["requests_running"] == 0
    assert metrics(soaked.url)["baton_requests_queued"] == 0
