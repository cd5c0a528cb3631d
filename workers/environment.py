"""What a worker's process must set before torch and vLLM are imported, which read it once."""

from __future__ import annotations

import os
from collections.abc import Sequence


def prepare_environment(cpu_ids: Sequence[int]) -> None:
    """Keep this process to `cpu_ids` (all cores if empty), and vLLM's engine to this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if cpu_ids:
        os.sched_setaffinity(0, cpu_ids)
        os.environ["OMP_NUM_THREADS"] = str(len(cpu_ids))
