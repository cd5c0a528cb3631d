"""Workers without a model, for tests of what routers do by themselves."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.nursery import Nursery
from tests.processes import Cluster, Process, free_port, redis_server

INTERVAL_S = 0.05
DEADLINE_S = 60.0


@contextlib.contextmanager
def stub_workers(folder: Path, vllm_args: list[str], nursery: Nursery) -> Iterator[Cluster]:
    """A cluster without a router, whose decode worker makes a token each INTERVAL_S."""
    with redis_server(folder) as (redis_url, _):
        args = [*vllm_args, "--max-model-len", "2048"]
        control_port = free_port()
        settings = [
            json.dumps(
                {
                    "worker_id": f"{pool}-0",
                    "incarnation": "1",
                    "vllm_args": args,
                    "cpu_ids": sorted(os.sched_getaffinity(0))[:1],
                    "redis_url": redis_url,
                    "pool": pool,
                    "handoff": {},
                }
            )
            for pool in ("prefill", "decode")
        ]
        command = [sys.executable, "-m", "workers.stub", str(control_port), *settings]
        workers = nursery.spawn("stubs", command, folder)
        cluster = Cluster("", redis_url, folder, args, spawn=nursery.spawn)
        try:
            _set_pace(control_port, workers)
            yield cluster
        finally:
            workers.stop()


def _set_pace(control_port: int, workers: Process) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        control.settimeout(0.5)
        control.connect(("127.0.0.1", control_port))
        while True:
            try:
                control.send(json.dumps({"interval_s": INTERVAL_S}).encode())
                control.recv(100)
                return
            except OSError:
                assert workers.popen.poll() is None, workers.output()
                assert time.monotonic() < deadline_s, workers.output()
                time.sleep(0.1)
