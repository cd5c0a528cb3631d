"""How this process keeps the memory it has freed."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8
"""From malloc.h."""
TRIM_BYTES = (1 << 31) - 1
TOP_PAD_BYTES = 64 << 20
MMAP_BYTES = 32 << 20
"""The largest that glibc takes."""


def keep_freed_memory() -> None:
    """Let malloc reuse what KV was in, in place of giving it back and asking for it again.

    By default glibc gives large pieces back at once, so every byte of a hand-off lands in pages
    that the kernel first has to find and clear: that took more time than moving the bytes. And each
    thread keeps what it frees to itself, where every transfer has its own and gRPC several. What is
    kept is what the inbox and the stage held at their fullest, which are bounded. Elsewhere than on
    glibc nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, TRIM_BYTES)
        mallopt(_M_TOP_PAD, TOP_PAD_BYTES)
        mallopt(_M_MMAP_THRESHOLD, MMAP_BYTES)
        mallopt(_M_ARENA_MAX, 1)
