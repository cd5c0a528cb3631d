"""What a worker's process must set before torch and vLLM are imported, which read it once."""

from __future__ import annotations

import os
from collections.abc import Sequence


def prepare_environment(cpu_ids: Sequence[int]) -> None:
    """Keep this process to `cpu_ids` (all cores if empty), and vLLM's engine to this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # Ranks are processes of their own, and this one has threads: they cannot be forked from it.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    if cpu_ids:
        os.sched_setaffinity(0, cpu_ids)
        os.environ["OMP_NUM_THREADS"] = str(len(cpu_ids))


def bind_ranks(ranks: int, cpu_ids: Sequence[int]) -> None:
    """Divide these cores (all if empty) among the ranks that this process starts; without
    accelerators, ranks compute there. Where there are fewer cores, ranks have some in common."""
    cores = sorted(cpu_ids or os.sched_getaffinity(0))
    size = max(1, len(cores) // ranks)
    of_each = (
        {cores[i % len(cores)] for i in range(rank * size, (rank + 1) * size)}
        for rank in range(ranks)
    )
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(
        ",".join(map(str, sorted(cores_of_rank))) for cores_of_rank in of_each
    )
