"""A transfer's frames in memory that the ranks of a worker map, each in its own process."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass

from cluster.wire import kv_pb2
from workers.kv.frames import Frame

ALIGNMENT_BYTES = 64


@dataclass(frozen=True, slots=True)
class SharedFrames:
    """What a rank is told: where the memory is, and what lies where in it."""

    path: str
    size_bytes: int
    frames: list[tuple[bytes, int, int]]
    """Of each a KvFrame, and its payload's first byte and size."""

    def read(self) -> list[tuple[kv_pb2.KvFrame, memoryview]]:
        """
        Raises:
            OSError: the memory is gone.
        """
        fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            # Writable only because tensors want to be.
            memory = memoryview(mmap.mmap(fd, self.size_bytes))
        finally:
            os.close(fd)
        return [
            (kv_pb2.KvFrame.FromString(kv), memory[first : first + size])
            for kv, first, size in self.frames
        ]


class SharedMemory:
    """It has no name in any file system: with the last process that maps it, it is gone."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("baton-kv", os.MFD_CLOEXEC)
        self._size_bytes = 0
        self._frames: list[tuple[bytes, int, int]] = []

    def append(self, frame: Frame) -> None:
        first, payload = self._size_bytes, frame.payload
        written = 0
        while written < len(payload):
            written += os.pwrite(self._fd, payload[written:], first + written)
        self._frames.append((frame.header.kv.SerializeToString(), first, len(payload)))
        self._size_bytes = first + len(payload) + -len(payload) % ALIGNMENT_BYTES
        os.ftruncate(self._fd, self._size_bytes)

    def told(self) -> SharedFrames:
        return SharedFrames(f"/proc/{os.getpid()}/fd/{self._fd}", self._size_bytes, self._frames)

    def close(self) -> None:
        """Ranks that have mapped it keep it until they let go of it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
