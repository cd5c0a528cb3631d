"""`baton bench router`: what Baton's router costs beside vLLM's own API server.

Both serve the same client with the same load over engines without a model. Baton's router has stubs
of a prefill and a decode worker, over the real gRPC protocol; vLLM's API server has a stub of the
engine core's process, over vLLM's own. The two take turns, each with one core for itself; client,
stubs and Redis have a second one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cluster.bench.client import Client
from cluster.bench.report import BenchFailed, Goal, median, percentile, ratio
from cluster.bench.servers import (
    MODEL_NAME,
    PYTHON,
    WORKERS_METRICS,
    Server,
    Servers,
    on_cores,
    server_args,
    until_ready,
)
from cluster.bench.stream_client import Load, Seen, ask_stub
from cluster.config import BUNDLED_MODEL, BatonConfig, HandoffConfig
from cluster.processes import free_port
from cluster.router_process import ROUTER_COMMAND, router_settings

TOKENS_PER_S_RATIO_MIN = 0.9
CLIENT_MODULE = "cluster.bench.stream_client"
PLAIN_MODULE = "cluster.bench.plain_stub"
CORE_MODULE = "cluster.bench.stub_core"
WORKERS_MODULE = "workers.stub"
MAX_MODEL_LEN = 1024
VOCABULARY = 96
"""The bundled model's printable ASCII: text behind part of a longer character is held back."""
CLUSTER = "bench"

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class RouterSettings:
    streams: int = 64
    prompt_tokens: int = 64
    output_tokens: int = 128
    backlog_steps: int = 4
    """Steps that the engines are ahead of the client when throughput is measured."""
    interval_s: float = 0.02
    """From step to step when latency is measured."""
    warm_s: float = 1.0
    window_s: float = 4.0
    rounds: int = 5
    """Of throughput and latency, plain and Baton."""

    @property
    def paces(self) -> dict[str, dict[str, Any]]:
        return {
            "throughput": {"backlog_tokens": self.backlog_steps * self.streams},
            "latency": {"interval_s": self.interval_s},
        }


QUICK = RouterSettings(
    streams=8, output_tokens=16, interval_s=0.05, warm_s=0.1, window_s=0.5, rounds=1
)
"""Shows that it works, not what it costs."""


@dataclass(slots=True)
class SideSamples:
    """All that was measured of one side, over all rounds."""

    tokens_per_s: list[float] = field(default_factory=list)
    tokens_per_event: list[float] = field(default_factory=list)
    """While throughput was measured: above one, the server has put tokens together."""
    cpu_s_per_token: list[float] = field(default_factory=list)
    """The server's, at that time."""
    latency_s: list[float] = field(default_factory=list)
    """From a token's step to the client, for each token."""
    requests_by_path: dict[str, int] = field(default_factory=dict)

    def add_throughput(self, seen: Seen) -> None:
        self.tokens_per_s.append(seen.tokens / seen.window_s)
        self.tokens_per_event.append(seen.tokens / max(1, seen.events))
        self.cpu_s_per_token.append(seen.cpu_s / max(1, seen.tokens))

    def add_latency(self, seen: Seen, made_s: dict[str, list[float]]) -> None:
        """`made_s` is by the engines' ids: the client's, then two parts behind dashes. A request
        with two legs has two of them."""
        made_of: dict[str, list[float]] = {}
        for leg_id, times_s in made_s.items():
            made_of.setdefault(leg_id.rsplit("-", 2)[0], []).extend(times_s)
        for request_id, received_s in seen.token_times_s.items():
            self.latency_s += [
                at_s - made
                for made, at_s in zip(sorted(made_of[request_id]), received_s, strict=False)
                if seen.start_s <= made and at_s <= seen.end_s
            ]


@dataclass(frozen=True, slots=True)
class Side:
    server: Server
    control_port: int
    samples: SideSamples


async def run_router(
    settings: RouterSettings, servers: Servers, report: Report
) -> dict[str, SideSamples]:
    """Measure both in turn.

    Raises:
        BenchFailed
    """
    cores = sorted(os.sched_getaffinity(0))
    server_core, other_core = cores[:1], cores[1:2]
    async with contextlib.AsyncExitStack() as stack:
        report("starting vLLM's API server, Baton's router and stub workers")
        stubs_port, core_port = free_port(), free_port()
        redis_url, _ = await stack.enter_async_context(servers.redis(cores=other_core))
        stubs = [*PYTHON, WORKERS_MODULE, str(stubs_port), *_stub_workers(redis_url)]
        await stack.enter_async_context(servers.running("stubs", stubs_port, stubs, other_core, {}))
        baton = await stack.enter_async_context(_baton(servers, redis_url, server_core))
        core = [*PYTHON, CORE_MODULE, str(core_port), str(servers.folder)]
        await stack.enter_async_context(servers.running("core", core_port, core, other_core, {}))
        plain = await stack.enter_async_context(_plain(servers, server_core))
        await until_ready(plain, "/health", [])
        await until_ready(baton, "/metrics", WORKERS_METRICS)
        sides = {
            "plain": Side(plain, core_port, SideSamples()),
            "baton": Side(baton, stubs_port, SideSamples()),
        }
        with on_cores(other_core):
            await _measure(settings, sides, servers.folder, report)
        async with Client(baton.url, MODEL_NAME) as client:
            by_path = (await client.router_state())["requests_by_path"]
        sides["baton"].samples.requests_by_path = by_path
    return {name: side.samples for name, side in sides.items()}


def _plain(servers: Servers, cores: list[int]) -> contextlib.AbstractAsyncContextManager[Server]:
    port = free_port()
    address = ["--host", "127.0.0.1", "--port", str(port)]
    command = [*PYTHON, PLAIN_MODULE, str(servers.folder), *_vllm_args(), *address]
    return servers.running("plain", port, command, cores, {})


def _baton(
    servers: Servers, redis_url: str, cores: list[int]
) -> contextlib.AbstractAsyncContextManager[Server]:
    # Without what the environment and baton.yaml say.
    config = BatonConfig.model_construct(
        name=CLUSTER, handoff=HandoffConfig(when="always"), vllm_args=_vllm_args()[2:]
    )
    port = free_port()
    command = [*ROUTER_COMMAND, router_settings(config, redis_url, "router-0", port)]
    return servers.running("baton", port, command, cores, {})


def _stub_workers(redis_url: str) -> list[str]:
    return [
        json.dumps(
            {
                "worker_id": f"{pool}-0",
                "incarnation": "bench",
                "vllm_args": ["--served-model-name", MODEL_NAME],
                "redis_url": redis_url,
                "cluster": CLUSTER,
                "pool": pool,
                "handoff": {},
            }
        )
        for pool in ("prefill", "decode")
    ]


def _vllm_args() -> list[str]:
    return ["--model", str(BUNDLED_MODEL), *server_args(MAX_MODEL_LEN, [])]


async def _measure(
    settings: RouterSettings, sides: dict[str, Side], folder: Path, report: Report
) -> None:
    for side in sides.values():
        await _load(side, settings, settings.paces["throughput"])
    for i in range(settings.rounds):
        for name, side in sides.items():
            report(f"round {i + 1} of {settings.rounds}: {name}")
            seen = await _load(side, settings, settings.paces["throughput"])
            side.samples.add_throughput(seen)
            # What was made until here is of no interest.
            await _made_s(side, folder)
            seen = await _load(side, settings, settings.paces["latency"])
            side.samples.add_latency(seen, await _made_s(side, folder))


async def _load(side: Side, settings: RouterSettings, pace: dict[str, Any]) -> Seen:
    load = Load(
        port=int(side.server.url.rsplit(":", 1)[1]),
        pid=side.server.process.pid,
        control_port=side.control_port,
        model=MODEL_NAME,
        vocabulary=VOCABULARY,
        pace=pace,
        streams=settings.streams,
        prompt_tokens=settings.prompt_tokens,
        output_tokens=settings.output_tokens,
        warm_s=settings.warm_s,
        window_s=settings.window_s,
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", CLIENT_MODULE, load.to_json()), stdout=subprocess.PIPE
    )
    try:
        out, _ = await process.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    if process.returncode:
        raise BenchFailed(f"no answer: see the message above; {side.server.last_words()}")
    return Seen(**json.loads(out))


async def _made_s(side: Side, folder: Path) -> dict[str, list[float]]:
    """When the side's engines made which tokens, since this was asked for the last time."""
    path = folder / "made.json"
    await ask_stub(side.control_port, {"dump": str(path)})
    made_s: dict[str, list[float]] = json.loads(path.read_text())
    return made_s


def summary(
    machine: dict[str, Any], settings: RouterSettings, samples: dict[str, SideSamples]
) -> dict[str, Any]:
    """The report as one JSON object. Throughputs are medians over the rounds."""
    results = {name: _side_result(side) for name, side in samples.items()}
    plain, baton = results["plain"], results["baton"]
    goal = Goal(
        "tokens_per_s_ratio",
        ratio(baton["tokens_per_s"], plain["tokens_per_s"]),
        TOKENS_PER_S_RATIO_MIN,
        at_most=False,
    )
    return {
        "bench": "router",
        "machine": machine,
        "settings": asdict(settings),
        "results": results,
        "requests_by_path": samples["baton"].requests_by_path,
        "goals": [goal.to_json()],
    }


def _side_result(samples: SideSamples) -> dict[str, Any]:
    return {
        "tokens_per_s": median(samples.tokens_per_s),
        "tokens_per_event": median(samples.tokens_per_event),
        "cpu_us_per_token": median(samples.cpu_s_per_token, 1e6),
        "latency_p50_ms": percentile(samples.latency_s, 50, 1e3),
        "latency_p99_ms": percentile(samples.latency_s, 99, 1e3),
    }
