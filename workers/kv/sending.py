"""What senders hold, counted, also where they are in other processes: those of the ranks."""

from __future__ import annotations

import mmap
import os
import struct
from typing import NamedTuple

_COUNTS = struct.Struct("3q")


class Sending(NamedTuple):
    transfers: int = 0
    staged_bytes: int = 0
    peers: int = 0

    def __add__(self, other: object) -> Sending:
        assert isinstance(other, Sending)
        return Sending(*(mine + others for mine, others in zip(self, other, strict=True)))


class RanksSending:
    """Memory in which each rank writes what its sender holds, for the worker to read. It has no
    name in any file system: with the last process that maps it, it is gone."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._fd = os.memfd_create("baton-sending", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, ranks * _COUNTS.size)
        self._memory = mmap.mmap(self._fd, ranks * _COUNTS.size)

    @property
    def path(self) -> str:
        """As long as it is not closed."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def total(self) -> Sending:
        counts = _COUNTS.iter_unpack(self._memory[:])
        return sum((Sending(*rank) for rank in counts), Sending())

    def close(self) -> None:
        os.close(self._fd)


class RankSending:
    """One rank's end of it."""

    def __init__(self, path: str, rank: int) -> None:
        """
        Raises:
            OSError: the worker is gone.
        """
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._memory = mmap.mmap(fd, 0)
        finally:
            os.close(fd)
        self._first = rank * _COUNTS.size

    def tell(self, sending: Sending) -> None:
        _COUNTS.pack_into(self._memory, self._first, *sending)
