"""What can be found out before `baton up` starts anything."""

from __future__ import annotations

import socket
from pathlib import Path

from cluster.config import BatonConfig
from cluster.engine_build import on_gpu
from cluster.run_file import running
from cluster.scheduler.view import Pool
from cluster.vllm_args import tensor_parallel, vllm_args

MEMORY_PER_CPU_WORKER_BYTES = 2 << 30
"""A vLLM process on CPU takes 1.7 GB beside weights and KV (measured, vLLM 0.32)."""


class StartFailed(Exception):
    """The cluster cannot be started. The message says why, in one line."""


def check_start(config: BatonConfig) -> None:
    """
    Raises:
        StartFailed
    """
    other = running(config.name)
    if other is not None:
        raise StartFailed(
            f"a cluster named {config.name!r} runs already at {other.url} (pid {other.pid}): "
            "stop it with `baton down`, or give this one another --name"
        )
    _check_ports(config)
    path = Path(config.model_path)
    looks_local = config.model_path.startswith((".", "/", "~")) or path.exists()
    if looks_local and not (path / "config.json").is_file():
        raise StartFailed(
            f"model {config.model_path}: no config.json there; give a folder with a model, or "
            "the name of one on Hugging Face"
        )
    if config.ray_address is None:
        _check_memory(config)


def router_ports(config: BatonConfig) -> range:
    return range(config.port, config.port + config.routers)


def ranks(config: BatonConfig) -> int:
    """Of all workers."""
    return sum(count * ranks for count, ranks in _pools(config))


def _check_ports(config: BatonConfig) -> None:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    for port in router_ports(config):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((config.host, port))
            except OSError as error:
                raise StartFailed(
                    f"port {port} on {config.host} cannot be used "
                    f"({error.strerror}): choose another with --port"
                ) from error


def _check_memory(config: BatonConfig) -> None:
    if on_gpu():
        return
    import psutil

    workers = config.prefill + config.decode
    # A worker of one rank computes in its own process.
    processes = sum(count * (ranks + 1 if ranks > 1 else 1) for count, ranks in _pools(config))
    needed = (processes + 1) * MEMORY_PER_CPU_WORKER_BYTES
    free = psutil.virtual_memory().available
    if needed > free:
        raise StartFailed(
            f"{workers} workers on CPU and a router need about {needed >> 30} GiB of memory, "
            f"{free / (1 << 30):.1f} GiB are free: use fewer with --prefill and --decode"
        )


def _pools(config: BatonConfig) -> list[tuple[int, int]]:
    """Workers of each pool, and the ranks of each of them."""
    counts = {Pool.PREFILL: config.prefill, Pool.DECODE: config.decode}
    return [(counts[pool], tensor_parallel(vllm_args(config, pool))) for pool in Pool]
