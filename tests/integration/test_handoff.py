"""The hand-off between two real workers: what arrives is adopted, what is damaged is recomputed,
and nothing is left held."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx

from tests.integration.test_equal_to_plain_vllm import ask, prompt_of
from tests.processes import Cluster, metrics


def worker_rows(cluster: Cluster) -> dict[str, dict[str, Any]]:
    state = httpx.get(f"{cluster.url}/dashboard/state").json()
    return {row["worker_id"]: row for row in state["workers"]}


def wait_for(what: str, condition: Any, deadline_s: float = 15.0) -> None:
    until = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < until, f"not within {deadline_s:g} s: {what}"
        time.sleep(0.05)


def test_client_that_leaves_ends_its_request_everywhere(cluster: Cluster) -> None:
    """At many points of a request's life; afterwards no worker runs or holds anything."""

    async def leave_after(seconds: float, seed: int) -> None:
        body = {
            "model": "m",
            "prompt": prompt_of(300, 1000 + seed),
            "max_tokens": 200,
            "ignore_eos": True,
            "stream": True,
        }
        async with httpx.AsyncClient() as client:
            try:
                async with asyncio.timeout(seconds):
                    async with client.stream(
                        "POST", f"{cluster.url}/v1/completions", json=body
                    ) as response:
                        async for _ in response.aiter_bytes():
                            pass
            except TimeoutError:
                pass

    async def all_leave() -> None:
        await asyncio.gather(*(leave_after(0.01 + 0.03 * i, i) for i in range(24)))

    aborted = 'baton_requests_total{path="aborted"}'
    before = metrics(cluster.url)[aborted]
    asyncio.run(all_leave())
    wait_for(
        "the router has no request left",
        lambda: httpx.get(f"{cluster.url}/dashboard/state").json()["requests_running"] == 0,
    )
    assert metrics(cluster.url)[aborted] > before
    # A worker tells its load with each step: one request more, and the figures are of now.
    ask(cluster.url, "/v1/completions", {"prompt": prompt_of(200, 999), "max_tokens": 3})
    wait_for(
        "workers hold nothing",
        lambda: all(
            row["running"] + row["waiting"] == 0 and row["inbox_bytes"] == 0
            for row in worker_rows(cluster).values()
        ),
    )


def test_a_request_that_a_stop_string_ends_counts_as_others_do(cluster: Cluster) -> None:
    body = {"prompt": prompt_of(50, 77), "max_tokens": 20, "temperature": 0, "ignore_eos": True}
    text = ask(cluster.url, "/v1/completions", body)[1]["choices"][0]["text"]
    before = metrics(cluster.url)
    body["stop"] = [text[len(text) // 2 :][:3]]
    choice = ask(cluster.url, "/v1/completions", body)[1]["choices"][0]
    assert choice["finish_reason"] == "stop"
    after = metrics(cluster.url)
    counted = {name: after[name] - before[name] for name in after if "baton_requests_total" in name}
    assert counted.pop('baton_requests_total{path="handed_over"}') == 1
    assert not any(counted.values())


def test_hundred_requests_at_once(cluster: Cluster) -> None:
    """Each answer is its own: alone and in a crowd it is the same."""

    async def crowd() -> list[Any]:
        async with httpx.AsyncClient(timeout=120) as client:
            answers = await asyncio.gather(
                *(
                    client.post(f"{cluster.url}/v1/completions", json=bodies[i])
                    for i in range(len(bodies))
                )
            )
        return [answer.json()["choices"][0]["text"] for answer in answers]

    bodies = [
        {"model": "m", "prompt": prompt_of(20 + i, 3000), "max_tokens": 8, "temperature": 0}
        for i in range(100)
    ]
    alone = [
        ask(cluster.url, "/v1/completions", body)[1]["choices"][0]["text"] for body in bodies[:10]
    ]
    together = asyncio.run(crowd())
    assert together[:10] == alone
    assert metrics(cluster.url)['baton_requests_total{path="recomputed"}'] == 0
