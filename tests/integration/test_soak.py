"""A thousand requests of random lengths, many of them given up at a random point of their lives,
while workers are killed at random: what is answered is right, and in the end nothing is held."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.integration.conftest import MAX_MODEL_LEN
from tests.integration.held import FREE_S, Held, Watch, at_rest, differences
from tests.integration.test_equal_to_plain_vllm import ask, prompt_of
from tests.processes import Cluster, metrics

SEED = 20_261
REQUESTS = 1000
AT_ONCE = 12
PROMPTS = 40
FOLLOW_UPS = 12
"""Of the prompts, that go on where another one ends: its KV may be there already."""
OUTPUT_TOKENS_MAX = 20
GIVE_UP = 0.3
"""Share of the requests that their client gives up: half of them at a random time, and a quarter
each with the first token, as KV is handed over, and with a later one."""
GIVE_UP_WITHIN_S = 0.5
GIVEN_UP_TOKENS = 200
"""That such a request asks for: more than come in that time."""
GIVEN_UP = ("before the first token", "with the first token", "while it decoded")
KILL_EVERY = 200
"""Requests."""
BACK_S = 60.0
"""For a worker to come back that a busy machine kept from renewing its lease."""
ABORTED = 'baton_requests_total{path="aborted"}'
POOL_OF = {"prefill-0": "prefill", "decode-1": "decode", "decode-2": "decode"}


class GivenUpError(Exception):
    """The client has as many tokens as it wanted to see."""


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
        give_up_s = give_up_tokens = None
        if self.random.random() < GIVE_UP:
            if self.random.random() < 0.5:
                give_up_s = self.random.uniform(0, GIVE_UP_WITHIN_S)
            else:
                later = self.random.randint(2, OUTPUT_TOKENS_MAX)
                give_up_tokens = self.random.choice([1, later])
            room = MAX_MODEL_LEN - len(body["prompt"])
            tokens = body["max_tokens"] = min(GIVEN_UP_TOKENS, room)
        said: list[int] = []
        try:
            async with asyncio.timeout(give_up_s):
                problem = await self.stream(client, body, said, give_up_tokens)
        except (TimeoutError, GivenUpError):
            self.ended[GIVEN_UP[min(len(said), 2)]] += 1
            problem = ""
        else:
            self.ended["answered"] += 1
            if not problem and len(said) != tokens:
                problem = f"{len(said)} tokens instead of {tokens}"
        known = self.expected[which][: len(said)]
        if said[: len(known)] != known:
            problem = f"{said} does not begin as {self.expected[which]}"
        if problem:
            self.wrong.append(f"request {number}, prompt {which}: {problem}")

    async def stream(
        self,
        client: httpx.AsyncClient,
        body: dict[str, Any],
        said: list[int],
        give_up_tokens: int | None,
    ) -> str:
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
                    if give_up_tokens is not None and len(said) >= give_up_tokens:
                        raise GivenUpError
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

    def incarnations(self) -> set[str]:
        return {self.incarnation(name) for name in self.cluster.workers}

    def incarnation(self, name: str) -> str:
        command = self.cluster.workers[name].popen.args
        assert isinstance(command, list)
        return str(json.loads(command[-1])["incarnation"])


async def workers_in_reach(cluster: Cluster) -> dict[str, str]:
    """Incarnations of those that are ready, by worker, as the router sees them."""
    async with httpx.AsyncClient() as client:
        state = (await client.get(f"{cluster.url}/dashboard/state")).json()
    found = dict.fromkeys(POOL_OF, "")
    ready = [row for row in state["workers"] if row["state"] == "ready"]
    return found | {row["worker_id"]: row["incarnation"] for row in ready}


def prompts() -> list[list[int]]:
    lengths = random.Random(SEED)
    first = [
        prompt_of(lengths.randint(2, 450 if i >= FOLLOW_UPS else 280), 50_000 + i)
        for i in range(PROMPTS - FOLLOW_UPS)
    ]
    further = [
        said + prompt_of(lengths.randint(140, 180), 60_000 + i)
        for i, said in enumerate(first[:FOLLOW_UPS])
    ]
    return first + further


def test_nothing_is_held_and_nothing_wrong_after_a_thousand_requests(
    gated: Cluster, plain: str
) -> None:
    bodies: list[dict[str, Any]] = [
        {
            "model": "m",
            "prompt": prompt,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        for prompt in prompts()
    ]
    expected = [
        ask(plain, "/v1/completions", {**body, "max_tokens": OUTPUT_TOKENS_MAX})[1]["choices"][0][
            "token_ids"
        ]
        for body in bodies
    ]
    with Watch(gated) as watch:
        before = at_rest(watch)
    told_before = metrics(gated.url)
    soak = Soak(gated, bodies, expected)
    asyncio.run(soak.run())
    assert not soak.wrong, "\n".join(soak.wrong[:20])
    given_up = {when: soak.ended[when] for when in GIVEN_UP}
    assert soak.ended["answered"] + sum(given_up.values()) == REQUESTS
    assert min(given_up.values()) > REQUESTS * GIVE_UP / 30, given_up
    assert soak.ended["killed"] == REQUESTS // KILL_EVERY
    told = metrics(gated.url)
    grew = {name: told[name] - told_before[name] for name in told_before}
    assert grew["baton_handoffs_completed_total"] > REQUESTS / 4
    assert grew["baton_handoff_held_tokens_total"] > 0
    assert grew[ABORTED] > REQUESTS * GIVE_UP / 2

    until_s = time.monotonic() + BACK_S
    while set(asyncio.run(workers_in_reach(gated)).values()) != soak.incarnations():
        assert time.monotonic() < until_s, "a worker does not come back"
        time.sleep(0.2)
    until_s = time.monotonic() + FREE_S
    with Watch(gated) as watch:
        print(
            "BEFORE",
            before,
            "NOW",
            watch.now(),
            soak.ended,
            {k: v for k, v in grew.items() if v and "bucket" not in k and "baton_" in k},
        )
        while held := differences(without_peers(watch.now()), without_peers(before)):
            assert time.monotonic() < until_s, f"still held: {held}"
            time.sleep(0.2)


def without_peers(held: Held) -> Held:
    """Connections are as many as workers that were sent to."""
    return {
        process: {what: count for what, count in counts.items() if what != "peers"}
        for process, counts in held.items()
    }
