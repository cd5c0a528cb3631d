"""What Baton uses of nixl: one agent a process, with UCX. The only file that knows its bindings.

They are used in place of nixl's own class because that polls without a pause, which takes a core.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from dataclasses import dataclass
from typing import Any

import torch

UCX = "UCX"
PROGRESS_S = 0.005
"""UCX wakes its thread for what comes; now and then it misses something."""


class NoNixl(Exception):
    """There is no nixl here, or it does not work."""


class ReadFailed(Exception):
    """The memory was not read, and nothing is written to here any more."""


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """Of another process's memory into this buffer."""

    buffer: torch.Tensor
    registered: Any
    handle: int


class Agent:
    """Safe to call from several threads. Methods raise what nixl does."""

    def __init__(self, worker: str) -> None:
        """`worker`: what names this worker start.

        Raises:
            NoNixl
        """
        # UCX keeps registrations of memory that was freed; without a limit it can run out of it.
        os.environ.setdefault("UCX_RCACHE_MAX_UNRELEASED", "1024")
        try:
            from nixl import _bindings
        except ImportError as error:
            raise NoNixl(f"nixl is not installed: `make setup-nixl` ({error})") from error
        self._nixl: Any = _bindings
        config = _bindings.nixlAgentConfig()
        config.useProgThread = True
        config.pthrDelay = int(PROGRESS_S * 1e6)
        config.syncMode = _bindings.NIXL_THREAD_SYNC_STRICT
        self.name = f"{worker}/{uuid.uuid4().hex}"
        try:
            self._agent = _bindings.nixlAgent(self.name, config)
            self._backends = [self._agent.createBackend(UCX, {})]
        except Exception as error:
            raise NoNixl(f"nixl does not work here: {error}") from error

    def register(self, memory: torch.Tensor) -> Any:
        """Returns what names it until it is deregistered."""
        place = [(memory.data_ptr(), len(memory), 0, b"")]
        registered = self._nixl.nixlRegDList(self._nixl.DRAM_SEG, place)
        self._agent.registerMem(registered, self._backends)
        return registered

    def deregister(self, registered: Any) -> None:
        self._agent.deregisterMem(registered, self._backends)

    def metadata(self, registered: Any) -> bytes:
        """By which others reach this agent and that memory."""
        return bytes(self._agent.getLocalPartialMD(registered, True, self._backends))

    def meet(self, metadata: bytes) -> None:
        """Make another agent known by its name."""
        self._agent.loadRemoteMD(metadata)

    def leave(self, peer: str) -> None:
        # Nixl may have forgotten it by itself.
        with contextlib.suppress(Exception):
            self._agent.invalidateRemoteMD(peer)

    def start_read(self, peer: str, address: int, size_bytes: int) -> Read:
        """Not over before `is_over` has said so, and not to be finished before that."""
        nixl, agent = self._nixl, self._agent
        buffer = torch.empty(size_bytes, dtype=torch.uint8)
        # One piece: a read is then over as a whole, or not at all.
        here = nixl.nixlXferDList(nixl.DRAM_SEG, [(buffer.data_ptr(), size_bytes, 0)])
        there = nixl.nixlXferDList(nixl.DRAM_SEG, [(address, size_bytes, 0)])
        registered = self.register(buffer)
        try:
            handle = agent.createXferReq(nixl.NIXL_READ, here, there, peer, "", self._backends)
        except Exception:
            self.deregister(registered)
            raise
        # What fails is found when it is asked whether the read is over.
        with contextlib.suppress(Exception):
            agent.postXferReq(handle)
        return Read(buffer, registered, handle)

    def is_over(self, read: Read) -> bool:
        """
        Raises:
            ReadFailed
        """
        nixl = self._nixl
        try:
            status = self._agent.getXferStatus(read.handle)
        except Exception as error:  # of nixl's own classes
            raise ReadFailed(f"a read failed: {error}") from error
        if status not in (nixl.NIXL_SUCCESS, nixl.NIXL_IN_PROG):
            raise ReadFailed(f"a read failed: {status}")
        return bool(status == nixl.NIXL_SUCCESS)

    def finish(self, read: Read) -> None:
        """Let go of one that is over, or has failed. Its buffer is the caller's."""
        self._agent.releaseXferReq(read.handle)
        self.deregister(read.registered)
