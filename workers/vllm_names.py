"""A worker of several ranks leaves nothing behind even if it is killed: what vLLM names, for its
processes to find each other, loses its name as soon as they have. Touches vLLM's message queue; see
tests/integration/test_vllm_seams.py."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from multiprocessing import resource_tracker

import psutil
from vllm.distributed.device_communicators.shm_broadcast import ShmRingBuffer

from cluster import vllm_names

SOCKETS_FOLDER = "VLLM_RPC_BASE_PATH"


@contextlib.contextmanager
def names_while_starting() -> Iterator[None]:
    """Start the ranks within."""
    tolerate_lost_names()
    folder = tempfile.mkdtemp(prefix="baton-")
    os.environ[SOCKETS_FOLDER] = folder
    try:
        yield
    finally:
        ranks = [process.pid for process in psutil.Process().children(recursive=True)]
        names = vllm_names.mapped_by([os.getpid(), *ranks])
        vllm_names.remove(names)
        for name in names:
            if name.startswith("psm_"):
                # It would miss them in the end. Ranks have the same.
                resource_tracker.unregister(f"/{name}", "shared_memory")
        shutil.rmtree(folder, ignore_errors=True)


def tolerate_lost_names(buffer: type[ShmRingBuffer] = ShmRingBuffer) -> None:
    """In each process of the engine: who made a queue's memory removes its name in the end."""
    remove = buffer.__del__

    def remove_if_there(self: ShmRingBuffer) -> None:
        with contextlib.suppress(FileNotFoundError):
            remove(self)

    buffer.__del__ = remove_if_there
