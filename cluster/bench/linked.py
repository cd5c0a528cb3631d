"""`baton bench handoff --link-gbit-s`: how much of a hand-off over a slow link prefill hides.

Baton with its two workers at the ends of a link of a given rate and delay (cluster/bench/link.py).
What a transfer's own time is follows from its bytes and the rate; what is not hidden of it is the
time from the end of the step that computed the prompt until the KV is adopted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.bench.client import Client, Stream, random_prompt
from cluster.bench.link import End, LinkSettings, check_link_possible
from cluster.bench.report import BenchFailed, Goal, median
from cluster.bench.servers import (
    MODEL_NAME,
    POLL_S,
    PYTHON,
    WORKERS_METRICS,
    Server,
    Servers,
    until_ready,
)
from cluster.bench.sides import CompareSettings, Report
from cluster.config import BatonConfig
from cluster.processes import free_port
from cluster.router_process import ROUTER_COMMAND, router_settings
from cluster.vllm_args import vllm_args as vllm_args_of

LINK_DEADLINE_S = 20.0
HIDDEN_MIN = 0.85
HIDDEN_TOKENS_MIN = 1024
"""Shorter prompts have no goal: a layer's computing is too short to hide a layer's transfer."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """One hand-off over the link, and what its client saw."""

    bytes: int
    wire_s: float
    """From its first frame's arrival to its last one's."""
    exposed_s: float
    ttft_s: float
    second_token_s: float
    """After the first."""


@contextlib.asynccontextmanager
async def _baton_over(
    servers: Servers, link: LinkSettings, model: Path, vllm_args: Sequence[str]
) -> AsyncIterator[Server]:
    """Baton, its prefill worker at one end of a link and its decode worker at the other.
    Without Ray, which starts no actor in a namespace."""
    config = BatonConfig.model_construct(
        name=f"bench-{servers.run_id}", model=str(model), vllm_args=list(vllm_args)
    )
    async with contextlib.AsyncExitStack() as stack:
        ends = await stack.enter_async_context(_ends(servers, link))
        redis_url, redis = await stack.enter_async_context(servers.redis(ends[0].machine_address))
        others = [redis]
        for pool, end, core in zip(("prefill", "decode"), ends, servers.cores, strict=True):
            settings = {
                "worker_id": f"{pool}-0",
                "incarnation": secrets.token_hex(6),
                "vllm_args": vllm_args_of(config),
                "host": end.address,
                "cpu_ids": [core],
                "handoff": {},
                "redis_url": redis_url,
                "cluster": config.name,
                "pool": pool,
            }
            command = end.command([*PYTHON, "workers", json.dumps(settings)])
            start = servers.running(pool, 0, command, [core], {})
            others.append(await stack.enter_async_context(start))
        port = free_port()
        command = [*ROUTER_COMMAND, router_settings(config, redis_url, "router-0", port)]
        start = servers.running("router", port, command, servers.cores, {})
        router = await stack.enter_async_context(start)
        await until_ready(router, "/metrics", WORKERS_METRICS, others)
        yield router


@contextlib.asynccontextmanager
async def _ends(servers: Servers, settings: LinkSettings) -> AsyncIterator[tuple[End, End]]:
    check_link_possible()
    values = {"name": servers.run_id[:6], **asdict(settings)}
    command = [*PYTHON, "cluster.bench.link", json.dumps(values)]
    async with servers.running("link", 0, command, servers.cores, {}) as link:
        deadline = time.monotonic() + LINK_DEADLINE_S
        while not (told := link.log.read_text()).endswith("\n"):
            if link.process.poll() is not None or time.monotonic() > deadline:
                raise BenchFailed(f"the link cannot be made: {link.last_words()}")
            await asyncio.sleep(POLL_S)
        a, b = json.loads(told)
        yield End(**a), End(**b)


async def run_linked(
    link: LinkSettings,
    model: Path,
    vocabulary: int,
    settings: CompareSettings,
    servers: Servers,
    report: Report,
) -> dict[int, list[Transfer]]:
    """Transfers by the length of their prompts.

    Raises:
        BenchFailed
    """
    transfers: dict[int, list[Transfer]] = {tokens: [] for tokens in settings.prompt_tokens}
    report("starting Baton at the ends of a link")
    start = _baton_over(servers, link, model, settings.server_args())
    async with start as server, Client(server.url, MODEL_NAME) as client:
        for tokens in settings.prompt_tokens:
            prompt = random_prompt(f"{tokens}/warm-up", tokens, vocabulary)
            await client.complete(prompt, settings.output_tokens)
        for tokens in settings.prompt_tokens:
            repeats = settings.repeats_of(tokens) * settings.rounds
            report(f"  {repeats} prompts of {tokens} tokens")
            for i in range(repeats):
                prompt = random_prompt(f"{tokens}/{i}", tokens, vocabulary)
                stream = await client.complete(prompt, settings.output_tokens)
                transfers[tokens].append(transfer_of(stream, await client.router_state()))
    return transfers


def transfer_of(stream: Stream, router_state: dict[str, Any]) -> Transfer:
    """
    Raises:
        BenchFailed: the request was not handed over.
    """
    handoff = _row(stream, router_state["recent_handoffs"])
    first_token = _row(stream, router_state["recent_first_tokens"])
    if handoff["result"] != "handed over":
        raise BenchFailed(f"a prompt was computed twice: {handoff['result']}")
    # The decode worker counts from when it is told of the request: that is after the router has
    # seen the first token.
    routed_s = first_token["forwarded_monotonic_s"] - first_token["step_ended_monotonic_s"]
    return Transfer(
        bytes=handoff["bytes"],
        wire_s=handoff["wire_s"],
        exposed_s=routed_s + handoff["exposed_s"],
        ttft_s=stream.first_token_s,
        second_token_s=stream.gaps_s[0],
    )


def _row(stream: Stream, rows: list[dict[str, Any]]) -> dict[str, Any]:
    for row in rows:
        if row["request_id"].startswith(f"{stream.request_id}-"):
            return row
    raise BenchFailed("the router tells nothing of a request's hand-off")


def summary(
    machine: dict[str, Any],
    model: dict[str, Any],
    settings: CompareSettings,
    link: LinkSettings,
    transfers: dict[int, list[Transfer]],
) -> dict[str, Any]:
    """The report as one JSON object. Times are medians in milliseconds."""
    results = {str(tokens): _length_result(link, of) for tokens, of in transfers.items()}
    return {
        "bench": "handoff over a link",
        "machine": machine,
        "model": model,
        "settings": {
            **asdict(settings),
            "max_model_len": settings.max_model_len,
            "dtype": "float32",
            "link": asdict(link),
        },
        "results": results,
        "goals": [goal.to_json() for goal in goals_of(results)],
    }


def goals_of(results: dict[str, dict[str, Any]]) -> list[Goal]:
    return [
        Goal(f"hidden_{tokens}", result["hidden"], HIDDEN_MIN, at_most=False)
        for tokens, result in results.items()
        if int(tokens) >= HIDDEN_TOKENS_MIN
    ]


def _length_result(link: LinkSettings, transfers: list[Transfer]) -> dict[str, Any]:
    own_s = [transfer.bytes * 8 / link.rate_bits_s for transfer in transfers]
    exposed_s = [transfer.exposed_s for transfer in transfers]
    return {
        "requests": len(transfers),
        "kv_bytes": transfers[0].bytes,
        "ttft_ms": median([transfer.ttft_s for transfer in transfers], 1e3),
        "second_token_ms": median([transfer.second_token_s for transfer in transfers], 1e3),
        "transfer_ms": median(own_s, 1e3),
        "wire_ms": median([transfer.wire_s for transfer in transfers], 1e3),
        "exposed_ms": median(exposed_s, 1e3),
        "hidden": median([1 - out / own for out, own in zip(exposed_s, own_s, strict=True)]),
    }
