"""vLLM's own prefill/decode split: two vLLM servers, joined by NixlConnector and vllm-router."""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import json
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

from cluster.bench.report import BenchFailed
from cluster.bench.servers import PYTHON, Server, Servers, until_ready
from cluster.processes import free_port

VLLM_WORKER_NAME = "VLLM::Worker"
ROUTER_MODULE = "vllm_router.launch_router"
LOWEST_PRIORITY = 19
PACKAGES = ("nixl", "vllm-router")


@contextlib.asynccontextmanager
async def nixl(
    servers: Servers, packages: Path, model: Path, vllm_args: Sequence[str]
) -> AsyncIterator[Server]:
    """A vLLM server that prefills and one that decodes, joined by vLLM's NixlConnector and
    vllm-router, which are in the folder `packages`."""
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(packages))))
    async with contextlib.AsyncExitStack() as stack:
        pair: list[Server] = []
        for index, role in enumerate(("producer", "consumer")):
            transfer = {"kv_connector": "NixlConnector", "kv_role": f"kv_{role}"}
            args = [*vllm_args, "--kv-transfer-config", json.dumps(transfer)]
            environment = {
                "PYTHONPATH": path,
                "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
                "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
            }
            core = servers.cores[index % len(servers.cores)]
            start = servers.noting(f"nixl-{role}", core, model, args, environment)
            pair.append(await stack.enter_async_context(start))
        for server, core in zip(pair, itertools.cycle(servers.cores), strict=False):
            await until_ready(server, "/health", [])
            keep_workers_to_core(server, core)
        port = free_port()
        command = [*PYTHON, ROUTER_MODULE, "--host", "127.0.0.1", "--port", str(port)]
        command += ["--prometheus-port", str(free_port())]
        command += ["--vllm-pd-disaggregation", "--kv-connector", "nixl"]
        command += ["--prefill", pair[0].url, "--decode", pair[1].url]
        environment = {"PYTHONPATH": path}
        start = servers.running("vllm-router", port, command, servers.cores, environment)
        router = await stack.enter_async_context(start)
        await until_ready(router, "/health", [])
        yield replace(router, steps=pair[0].steps)


def keep_workers_to_core(server: Server, core: int) -> None:
    """NixlConnector moves the thread that computes to the machine's last core, which is right where
    others do the computing. With one thread a worker, all servers would share that core.

    UCX's thread polls all the time, and would take half of the core from the one that computes. So
    all others than that have the lowest priority: the peer is not to lose by having one core.
    """
    for entry in Path("/proc").iterdir():
        # What is no process, or ends meanwhile, cannot be read.
        with contextlib.suppress(OSError, ValueError):
            ours = os.getsid(int(entry.name)) == server.process.pid
            if ours and (entry / "comm").read_text().startswith(VLLM_WORKER_NAME):
                for thread in (entry / "task").iterdir():
                    os.sched_setaffinity(int(thread.name), [core])
                    if thread.name != entry.name:
                        os.setpriority(os.PRIO_PROCESS, int(thread.name), LOWEST_PRIORITY)


def peer_versions(packages: Path) -> dict[str, str]:
    """What is installed in the folder.

    Raises:
        BenchFailed: something is missing.
    """
    found = {
        distribution.name: distribution.version
        for distribution in importlib.metadata.distributions(path=[str(packages)])
    }
    missing = [name for name in PACKAGES if name not in found]
    if missing:
        raise BenchFailed(
            f"{' and '.join(missing)} not found in {packages}: run 'make setup-peer', name the "
            "folder with --peer, or leave vLLM's own split out with --no-peer"
        )
    return {name: found[name] for name in PACKAGES}
